"""Every check in words: what its number measures, and what a bad one would mean.

One table, keyed by the name of a check; a test holds it against the gates and the names that the ladder records.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """Two sentences about a check and the unit of its number, empty where it is a count or a ratio."""

    measures: str
    bad: str
    unit: str = ""


RUNGS = {
    "L0": (
        "Is our model the original?",
        "Our modules in PyTorch against transformers, both in float32. An error here is in the export's own model.",
    ),
    "L1": (
        "Does the runtime compute our model?",
        "The lowered program without quantisation against our modules. An error here is in the lowering.",
    ),
    "L2": (
        "Does the bundle hold the weights it should?",
        "The weights stored in the bundle against the quantiser, bit for bit. An error here is in the packing.",
    ),
    "L3": (
        "Does the bundle answer like the original?",
        "The shipped bundle against transformers in float32. What is worse here than above comes from quantisation "
        "and the runtime's arithmetic.",
    ),
}
"""Of every rung: the question it answers, and how."""
GOLDEN = (
    "Does the bundle compute what others measured?",
    "The shipped bundle against a published golden of its checkpoint: scores after a prompt with a picture, and a "
    "greedy answer. No checkpoint takes part.",
)
"""The same of the golden, which stands beside the rungs and is no part of the ladder."""

RELATIVE = "largest error, over the largest value"
WORDS = {
    "L0.logits": Words(
        f"Scores of the next token at every position ({RELATIVE}).",
        "our model computes something else than the original: every bundle made from it is wrong.",
    ),
    "L0.states": Words(
        f"What the layers remember after the text, the worst of all states ({RELATIVE}).",
        "a layer remembers something else than the original, and later tokens go wrong.",
    ),
    "L0.vision": Words(
        f"What the encoder makes of test pictures ({RELATIVE}).",
        "our encoder sees other pictures than the original.",
    ),
    "L0.rounding": Words(
        f"What float32 loses against float64 in our own modules, the unit of other limits ({RELATIVE}).",
        "the model loses so much in float32 that a fault could hide behind it.",
    ),
    "L0.pictures_in_text": Words(
        "Test pictures that stood in the text of the checks.",
        "with fewer than two, no check saw what a picture leaves behind for the text after it.",
    ),
    "L0.whole_model": Words(
        "The original computed layer by layer, as all checks do, against the original loaded as a whole.",
        "the reference itself is not what transformers computes, and no other check can be believed.",
    ),
    "L1.logits": Words(
        f"Scores of the next token after every call ({RELATIVE}).",
        "the runtime computes another model: an operator was lowered wrongly.",
    ),
    "L1.states": Words(
        f"What the layers remember after the last call, the worst of all states ({RELATIVE}).",
        "a state is stored or updated wrongly, and later tokens go wrong.",
    ),
    "L1.padding": Words(
        "How much nonsense in the padded rows of a chunk changes scores and states.",
        "what an app leaves behind its prompt would leak into the answer.",
    ),
    "L1.embed": Words(
        f"The rows that stand for token ids ({RELATIVE}).",
        "tokens are given the vectors of other tokens.",
    ),
    "L1.vision": Words(
        f"What the lowered encoder makes of test pictures ({RELATIVE}).",
        "the runtime's encoder sees other pictures than ours.",
    ),
    "L1.layers": Words(
        "Decoder layers that this rung compared.",
        "of a large model only the first layers, one of each kind, are lowered a second time.",
    ),
    "L2.mismatches": Words(
        "Stored weights that differ from what the quantiser gave.",
        "weights were packed at a wrong place, in a wrong order or with a wrong scale.",
        "weights",
    ),
    "L2.missing": Words(
        "Parameters of the model that the bundle lacks, or holds in part.",
        "a part of the model was never stored.",
        "parameters",
    ),
    "L2.tensor_error": Words(
        "The worst error that rounding and storage leave in a tensor, over its own size.",
        "a tensor was destroyed, for instance because its weights are smaller than any scale.",
    ),
    "L2.weights": Words(
        "Weights that were read back and compared.",
        "fewer than the model has parameters: part of the bundle was not looked at.",
        "weights",
    ),
    "L3.kl_mean": Words(
        "How far the probabilities of the next token are from the original's, mean over all positions (KL "
        "divergence; 0 is equal).",
        "the bundle expects other words than the original nearly everywhere; nonsense starts near 1.",
        "nats",
    ),
    "L3.kl_p99": Words(
        "The same at the worst hundredth of all positions.",
        "there are places where the bundle expects something else entirely.",
        "nats",
    ),
    "L3.kl_worst": Words(
        "The same at the worst position.",
        "at one place the bundle is sure of something that the original excludes.",
        "nats",
    ),
    "L3.sqnr_db": Words(
        "Power of the original's scores over that of the error in them; 20 dB is an error of a tenth.",
        "rounding errors are as loud as the answer itself.",
        "dB",
    ),
    "L3.top1": Words(
        "Share of positions where the bundle prefers the original's token; lost near ties do not count.",
        "a greedy answer soon becomes another one.",
    ),
    "L3.top5": Words(
        "Share of positions where the original's token is among the bundle's first five.",
        "even sampling rarely finds the original's words.",
    ),
    "L3.ambiguous": Words(
        "Share of positions where the bundle prefers another token and the original itself was nearly undecided.",
        "the text of the checks says little about agreement: top 1 leaves out many positions.",
    ),
    "L3.states": Words(
        f"What the layers remember after the text, the worst of all states ({RELATIVE}).",
        "the bundle has forgotten or misremembers what it read.",
    ),
    "L3.state_noise": Words(
        "Power of the error in what the layers remember over that of what they should, the worst of all states.",
        "a state was lost or damaged between two calls.",
    ),
    "L3.chunking": Words(
        "A prompt read in chunks against the same prompt token by token, as KL divergence.",
        "the answer depends on how an app cuts the prompt.",
        "nats",
    ),
    "L3.vision": Words(
        f"What the bundle's encoder makes of test pictures ({RELATIVE}).",
        "the bundle sees pictures blurred or wrongly.",
    ),
    "L3.drift": Words(
        "KL divergence over the last quarter of many decode steps.",
        "errors pile up in the state: long answers fall apart although short ones are right.",
        "nats",
    ),
    "L3.drift_first": Words(
        "The same over the first quarter, to compare with.",
        "the bundle is off from the start, and not by drifting.",
        "nats",
    ),
    "L3.drift_steps": Words(
        "Decode steps that the drift was measured over.",
        "few steps cannot show a slow drift.",
        "steps",
    ),
    "L3.drift_context": Words(
        "Tokens in the context at the last of those steps.",
        "a short context cannot show what a full one does.",
        "tokens",
    ),
    "L3.drift_*": Words(
        "Drift of the same weights with states kept in this other layout.",
        "that layout of the states loses precision that the bundle's own keeps.",
        "nats",
    ),
    "L3.stress_kl": Words(
        "The bundle against itself with sums rounded to float16 as they grow, as KL divergence.",
        "hardware that sums in float16 would answer differently; it is no model of any device.",
        "nats",
    ),
    "L3.kl_pictures": Words(
        "The divergence at positions inside pictures, where the next token is no text.",
        "hardly anything: no answer is read off there, but what a picture leaves behind may be off as well.",
        "nats",
    ),
    "L3.text_positions": Words(
        "Positions with text behind them that the numbers on text are about.",
        "few positions make a mean that says little.",
        "positions",
    ),
    "L3.certainty": Words(
        "How sure the original is of the next token of the text, on average: exp(-entropy), 1 where it knows.",
        "the original is lost on this text, so that it says little about the bundle.",
    ),
    "L3.perplexity": Words(
        "Perplexity of the bundle on the text: it is as undecided as among so many tokens.",
        "far above the original's, the bundle no longer knows this text.",
    ),
    "L3.perplexity_reference": Words(
        "Perplexity of the original on the same text.",
        "the original does not know this text either; it judges no bundle.",
    ),
    "L3.own_kl": Words(
        "How far the probabilities of the next token are from the original's, along what the bundle itself answers to "
        "conversations.",
        "the bundle says what the original would not say.",
        "nats",
    ),
    "L3.own_top1": Words(
        "Share of the bundle's own words that the original prefers too; lost near ties do not count.",
        "the original would have answered otherwise.",
    ),
    "L3.own_perplexity": Words(
        "Perplexity of the original on the bundle's answers over the bundle's own.",
        "the original finds the bundle's answers odd: they may be nonsense.",
    ),
    "L3.own_positions": Words(
        "Words of the bundle's own answers that were scored.",
        "few words make a mean that says little.",
        "positions",
    ),
    "L3.own_certainty": Words(
        "How sure the original is along the bundle's answers, on average.",
        "the bundle's answers lead where the original knows nothing.",
    ),
    "L3.given_kl": Words(
        "How far the probabilities of the next token are from the original's, along what the original answers to "
        "conversations.",
        "the bundle would leave the original's answers.",
        "nats",
    ),
    "L3.given_top1": Words(
        "Share of the original's words that the bundle prefers too; lost near ties do not count.",
        "the bundle would have answered otherwise.",
    ),
    "L3.given_perplexity": Words(
        "Perplexity of the bundle on the original's answers over the original's own.",
        "the bundle finds the right answers odd.",
    ),
    "L3.given_positions": Words(
        "Words of the original's answers that were scored.",
        "few words make a mean that says little.",
        "positions",
    ),
    "L3.answered": Words(
        "Share of conversations to which the bundle says anything at all.",
        "the bundle stops at once, and nothing was measured.",
    ),
    "L3.stopped_at_once": Words(
        "Conversations that the bundle leaves unanswered although the original would answer.",
        "the bundle has lost its voice.",
        "conversations",
    ),
    "L3.one_token": Words(
        "Answers of one token over and over, which the original's are not.",
        "the bundle is stuck, as one with broken states is.",
        "answers",
    ),
    "L3.reference_agrees": Words(
        "Share of the reference's own answers that transformers would have given as well.",
        "what the answers are compared with is not the original.",
    ),
    "L3.activations": Words(
        "The largest value that the bundle computes in float16 on the samples; float16 ends at 65,504.",
        "another conversation overflows, and the answer is nonsense without an error.",
    ),
    "L3.task_reference": Words(
        "Share of questions of the checkpoint's own task that the original answers rightly.",
        "the original cannot do its task either, and every loss would look harmless.",
    ),
    "L3.task_drop": Words(
        "Points of accuracy in the checkpoint's own task that the bundle lost, mean over its skills.",
        "the bundle does worse at what the checkpoint was trained for.",
        "points",
    ),
    "L3.task.*": Words(
        "Share of questions of this skill that the bundle answers rightly.",
        "the bundle lost this skill, or never had it: compare with the original's share.",
    ),
    "L3.text_runner": Words(
        f"Scores of the runtime's own text runner against the bundle's decoder ({RELATIVE}).",
        "apps that use the runtime's own runner get other answers than ours.",
    ),
    "golden.logits": Words(
        "Scores after the golden's prompt: its ten largest, and largest, smallest, mean and spread of all "
        f"({RELATIVE}).",
        "the bundle computes something else than the implementation that made the golden.",
    ),
    "golden.sqnr_db": Words(
        "Power of the golden's ten largest scores, less their mean, over that of the error in them.",
        "rounding errors are as loud as what tells the ten likeliest tokens apart.",
        "dB",
    ),
    "golden.ids": Words(
        "Tokens that the bundle puts above the golden's ten likeliest, near ties apart.",
        "the bundle thinks of tokens that the original leaves out.",
        "tokens",
    ),
    "golden.tokens": Words(
        "Share of the golden's answer that the bundle would have given too, token by token; near ties are left out.",
        "a greedy answer soon becomes another one.",
    ),
    "golden.top5": Words(
        "Share of the golden's answer that is among the bundle's first five tokens.",
        "even sampling rarely finds the original's words.",
    ),
    "golden.ambiguous": Words(
        "Tokens of the golden's answer that the bundle would exchange at a near tie.",
        "the golden says little about agreement: golden.tokens leaves out many places.",
        "tokens",
    ),
    "golden.prompt_tokens": Words(
        "Token ids of the golden's prompt, all as the bundle's tokenizer and template give them.",
        "a short prompt sees little of the model.",
        "tokens",
    ),
}
"""By name; a name that ends with * is that of a family of checks."""

STORAGE = {
    "exact": "With float16 read as float32, so that rounding hides no wrong lowering: ",
    "float16": "As stored, in float16: ",
}
"""Of checks `L1.STORAGE.NAME`, which are those of `L1.NAME` in another arithmetic."""

UNKNOWN = Words("This version has no description of this check.", "unknown; see its gate.")
"""Of reports that another version wrote."""


def words(name: str) -> Words:
    """What is known about a check, by its name as the report has it."""
    rung, _, rest = name.partition(".")
    storage, _, base = rest.partition(".")
    if rung == "L1" and storage in STORAGE:
        found = words(f"L1.{base}")
        return found if found is UNKNOWN else Words(STORAGE[storage] + found.measures, found.bad, found.unit)
    family = next((key for key in WORDS if key.endswith("*") and name.startswith(key[:-1]) and name != key[:-1]), "")
    return WORDS.get(name) or WORDS.get(family) or UNKNOWN
