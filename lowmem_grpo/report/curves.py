"""The charts of a run: which metrics stand in one picture, in the order of the page."""

from lowmem_grpo.report.chart import Chart, Dot, Series, chart
from lowmem_grpo.report.reading import RunFiles, number

MOST_LINES = 6  # in a picture
MOST_DOTS = 60
SHARES = {"completions/clipped_ratio": "cut off", "frac_reward_zero_std": "groups without a difference"}
TOOLS = {"tools/call_frequency": "calls for each completion", "tools/failure_frequency": "share of them that failed"}
SCORES = {"min_reward": "least", "mean_reward": "mean", "max_reward": "greatest"}


def charts_of(run: RunFiles) -> list[Chart]:
    """The pictures that a run has numbers for."""
    found = [
        with_held_out(run, "Reward", "reward"),
        with_held_out(run, "Accuracy", "accuracy"),
        parts_of_reward(run),
        None if run.kind == "grpo" else with_held_out(run, "Loss", "loss"),
        with_held_out(run, "Accuracy of tokens", "mean_token_accuracy"),
        with_held_out(run, "Margin between the scores of a pair", "margin"),
        several(run, "Scores", SCORES),
        lengths(run),
        several(run, "Shares", SHARES, from_zero=True),
        several(run, "Calls of tools", TOOLS, from_zero=True),
        one(run, "KL to the reference", "kl", unit="nats a token"),
        one(run, "KL to the teacher", "teacher_kl", unit="nats a token"),
        one(run, "Entropy", "entropy", unit="nats a token"),
        one(run, "Loss", "loss", from_zero=False) if run.kind == "grpo" else None,
        one(run, "Loss of the critic", "value_loss"),
        one(run, "Variance that the critic explains", "value/explained_variance", from_zero=False),
        one(run, "Share of clipped tokens", "clip_ratio/region_mean", unless_zero=True),
        one(run, "Gradient norm, before clipping", "grad_norm"),
        one(run, "Learning rate", "learning_rate", smooth=False),
        one(run, "Time of a step", "step_time", unit="s"),
    ]
    return [picture for picture in found if picture is not None]


def one(
    run: RunFiles, title: str, name: str, *, unit: str = "", from_zero: bool = True, smooth: bool = True,
    unless_zero: bool = False,
) -> Chart | None:  # fmt: skip
    """The picture of one metric; with unless_zero none where it is 0 throughout."""
    points = run.values(name)
    if unless_zero and not any(value for _, value in points):
        return None
    return chart(title, [Series(name, points)], unit=unit, from_zero=from_zero, smooth=smooth)


def with_held_out(run: RunFiles, title: str, name: str) -> Chart | None:
    """The picture of a metric of training, and of the evaluations' own with its intervals."""
    held_out = f"eval_{name}"
    dots = [
        Dot(line["step"], value, *(number(line.get(f"{held_out}/ci_{end}")) for end in ("low", "high")))
        for line in run.evaluations
        if (value := number(line.get(held_out))) is not None
    ]
    every = -(-len(dots) // MOST_DOTS) or 1
    return chart(title, [Series("training", run.values(name))], dots=dots[::-every][::-1], dots_label="held-out")


def several(run: RunFiles, title: str, labels: dict[str, str], *, from_zero: bool = False) -> Chart | None:
    """The picture of several metrics, by name what each is called."""
    lines = [Series(label, run.values(name)) for name, label in labels.items()]
    return chart(title, lines, from_zero=from_zero)


def parts_of_reward(run: RunFiles) -> Chart | None:
    """The picture of the rewards by function; none where there is one alone."""
    names = run.names("rewards/.+/mean")
    labels = {name: name.split("/", 1)[1].removesuffix("/mean")[:80] for name in names[:MOST_LINES]}
    return several(run, "Parts of the reward", labels) if len(names) > 1 else None


def lengths(run: RunFiles) -> Chart | None:
    """The picture of completions' lengths: their mean, between the least and the greatest."""
    mean, least, greatest = (run.values(f"completions/{which}_length") for which in ("mean", "min", "max"))
    return chart("Length of completions", [Series("mean", mean, (least, greatest))], unit="tokens", from_zero=True)
