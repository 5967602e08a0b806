"""The bundle as the contract between exporter, runtimes, apps and tests: manifest, writer, reader."""
