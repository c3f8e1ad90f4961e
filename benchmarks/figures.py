"""Writes the figures of docs/figures.md from benchmarks/results, between its two marks.

    python benchmarks/figures.py

The results come from these commands, one after the other on an idle machine:

    sd-dejavu bench --negatives-count 100 --json benchmarks/results/bench.json
    python benchmarks/tables.py
    python benchmarks/second_world.py --json benchmarks/results/second_world.json
    python benchmarks/batches.py --prompts 1000 --json benchmarks/results/batches.json
    python benchmarks/amg_thresholds.py
    sd-dejavu compare --pairs 20 --ordinary 10 --json benchmarks/results/compare.json --out docs
    python benchmarks/first_step.py --images 1 --json benchmarks/results/first_step.json
    python benchmarks/optimisation.py --json benchmarks/results/optimisation.json
    python benchmarks/training_filter.py --rounds 5 --json benchmarks/results/training_filter.json
    python benchmarks/audit.py --json benchmarks/results/audit.json
    python benchmarks/audit_scale.py --json benchmarks/results/audit_scale.json
    python benchmarks/parts.py --json benchmarks/results/parts.json
    python benchmarks/audit_image.py
    python benchmarks/repair.py --json benchmarks/results/repair.json
    python benchmarks/images.py
    python benchmarks/screenshots.py
    python benchmarks/on_a_card.py
    python benchmarks/webui_cost.py --pairs 7 --steps 20 --size 128 --json benchmarks/results/webui_cost.json
    python benchmarks/webui_screenshots.py
    python benchmarks/demo_calibration.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sd_dejavu.core.statistics import wilson
from sd_dejavu.training.audit import least_named

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures -->", "<!-- end figures -->"
# Methods that their papers report as effective on Stable Diffusion; whether they are so here, the table says.
PUBLISHED = ("attenuate-tokens", "batch-wise-noise", "guidance-transition", "per-sample-noise", "start-token")


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def share(value: dict[str, Any], digits: int = 2) -> str:
    low, high = value["interval"]
    return f"{value['share']:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def counted(row: dict[str, Any], name: str) -> str:
    """A share of a record of compare, with Wilson's interval."""
    hits, count = row[f"{name}_hits"], row[f"{name}_of"]
    return share({"share": hits / count, "interval": wilson(hits / count, count)})


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def detection() -> str:
    found = read("bench")
    rows = [
        (
            r["detector"],
            str(r["steps"] or "–"),
            str(r["images"] or "–"),
            f"{r['auc']:.3f} ({r['auc_interval'][0]:.3f}–{r['auc_interval'][1]:.3f})",
            f"{r['tpr_at_1_fpr']:.2f} ({r['tpr_interval'][0]:.2f}–{r['tpr_interval'][1]:.2f})",
            f"{r['seconds_per_prompt']:.3f}",
        )
        for r in found["rows"]
    ]
    return f"""**Detection**: {found["positives"]} held-out memorised captions (repeated 100 times or more) against \
{found["negatives"]} fresh ordinary ones.

{table(("detector", "steps", "images", "AUC (95%)", "TPR at 1% FPR (95%)", "s / prompt"), rows)}

This world is easy to tell, even for the tiled distance of several images; the letter-case control shows that it is
not the style of the captions. A bootstrap interval of (1, 1) says that nothing overlapped in these samples, no more.
The seconds are rough: one core, while other jobs shared the machine.
First step and four images against 1,000 ordinary captions, the hard half (told from ordinary captions by one trigger
name) apart: {hard_half()}."""


def hard_half() -> str:
    """The captions that only a trigger name tells from ordinary ones, apart from the rest."""
    rows = read("detection-by-kind")
    return "; ".join(
        f"{r['count']} {r['captions']} captions: AUC {r['auc']:.3f}, TPR at 1% FPR {r['tpr at 1% fpr']:.2f}"
        for r in rows
    )


def graded() -> str:
    rows = [
        (str(r["repetitions"]), r["kind"], f"{r['score']:.2f}", share(r["flagged"]), share(r["copies"]))
        for r in read("graded")
    ]
    head = ("repetitions", "pairs", "mean first-step score", "flagged", "images that are copies")
    return f"""**Memorisation against repetition**: held-out pairs, 2 images a caption; 'hard' captions are told from
ordinary ones by one trigger name.

![Share of copies and of flagged prompts against repetitions](graded.png)

{table(head, rows)}"""


def explanation() -> str:
    rows = [(r["view"], share(r["trigger named"])) for r in read("explanation")]
    count = read("explanation")[0]["trigger named"]["count"]
    return f"""**Explanation**: how often the top word is the planted trigger, {count} held-out hard pairs.

{table(("view", "trigger named"), rows)}"""


def calibration() -> str:
    rows = [
        (r["style"], share(r["flagged"], 3), f"{r['ks distance']:.3f}", f"{r['ks p']:.3f}") for r in read("calibration")
    ]
    return f"""**Calibration**: 1,000 fresh ordinary captions, every 50 on a noise of their own, alpha 0.01, against the
1,000 ordinary prompts of all styles; Kolmogorov–Smirnov distance of the two samples' scores.

{table(("style", "flagged", "KS distance", "KS p"), rows)}

The p-values hold for all styles together, as the first row shows. The others show how far they hold in each style; a
calibration with 999 ordinary prompts of a style compares with these alone."""


def second_world() -> str:
    found = read("second_world")
    rows = [
        (
            r["nulls"],
            f"{r['median']:.2f}",
            f"{r['ks distance']:.3f}",
            f"{r['ks p']:.2g}",
            shared(r["ordinary at 0.05"]),
            "yes" if r["said to be strangers"] else "no",
            shared(r["memorised at 0.01"]),
            shared(r["copies after mitigation"]),
        )
        for r in found["rows"]
    ]
    head = (
        "nulls",
        "median",
        "KS distance",
        "KS p",
        "p ≤ 0.05",
        "called strangers",
        "memorised, p ≤ 0.01",
        "copies left",
    )
    return f"""**Another world**: a second small model (shields on walls, described in words of heraldry; 48 x 48). Nothing was
tuned on it but the rule of recombining, which was chosen of three after a look at this table. It copies
{shared(found["copies"])} of its 40 memorised captions, and {shared(found["copies of held-out captions"])} of its own ordinary ones, which it never saw.
Of these, {found["rows"][0]["ordinary at 0.05"]["count"]} against ordinary prompts of each kind (the nulls' median beside that of the captions,
{found["median of held-out captions"]:.2f}; the KS test is that of two samples), the memorised ones, and the copies of
every fourth that `{found["mitigation"]}` leaves when it goes to the nulls' median, its default. Recombined prompts
are no such strangers to the model as generated ones, and not quite its own: p-values stay a little too large.

{table(head, rows)}"""


def shared(value: dict[str, int]) -> str:
    return f"{value['hits'] / value['count']:.2f} ({value['hits']} of {value['count']})"


def mitigation() -> str:
    found = read("compare")
    rows, reference = found["rows"], read("caption-score")[0]["caption score"]
    drawn, where = rows[0]["copies_of"], f" on {found['device']}" if "device" in found else ""
    images = f"{found['images']} images" if found["images"] > 1 else "one image"
    wrong = read("copy-metric")[0]["called copies"]
    return f"""**Mitigation**: {found["pairs"]} held-out memorised captions and {found["ordinary"]} ordinary ones, {images} each, \
{found["steps"]} steps{where},
every method from the same noise and with its one default setting. An image is a copy at a grey-value correlation of 0.8
or more with its training image (images of ordinary captions that this calls a copy of any training image:
{share(wrong)}).

{mitigation_table(rows)}

![Copies left against captions followed](compare.svg)

Similarity is the correlation with the training image, 'top 5%' its 95th percentile. The caption score is a diffusion
classifier (Li et al., ICCV 2023): the share of nine captions of other things under which the model denoises the image
worse than under the caption without its trigger (0.5 is chance; hard pairs only). Images drawn from those same captions
without triggers score {reference:.2f}. An ordinary image is untouched when it is the same bit for bit, its change is the
root mean square in 0 to 1. Seconds include the mitigation: the median over the captions of its time against that of plain
drawing, all methods in turn, so that other work on the machine slows all alike.{memory(found)}

No copy among {drawn} still allows a share of up to {wilson(0, drawn)[1]:.2f}. {amg()}{ineffective(rows)}"""


def mitigation_table(rows: Sequence[dict[str, Any]]) -> str:
    known = any(r["peak_memory_mb"] is not None for r in rows)
    head = ["method", "copies (95%)", "mean similarity", "top 5%", "first-step score", "caption score"]
    head += ["ordinary untouched", "change of ordinary", "seconds against plain", *(["peak MB"] if known else [])]
    lines = [
        [
            r["method"],
            counted(r, "copies"),
            number(r["similarity"], 2),
            number(r["similarity_top5"], 2),
            number(r["score"], 2),
            number(r["caption_score"], 2),
            f"{r['untouched_hits']} of {r['untouched_of']}",
            number(r["change_on_ordinary"], 3),
            number(r["seconds_ratio"], 2),
            *([number(r["peak_memory_mb"], 0)] if known else []),
        ]
        for r in rows
    ]
    return table(head, lines)


def memory(found: dict[str, Any]) -> str:
    if all(r["peak_memory_mb"] is None for r in found["rows"]):
        return ""
    what = "the whole process holds" if found.get("device", "cpu") == "cpu" else "PyTorch has allocated on the GPU"
    return f" Peak memory is the most that {what}."


def amg() -> str:
    found = read("amg_thresholds")
    fresh = found["other_ordinary_steered"]
    return f"""AMG compares grey values with the
training images themselves; its settings were chosen on the {found["pairs"]} tuning pairs and on ordinary captions of
another seed (`benchmarks/amg_thresholds.py`), with no held-out pair drawn. Of {fresh["count"]} further ordinary images it
steers {fresh["hits"]}."""


def ineffective(rows: Sequence[dict[str, Any]]) -> str:
    plain = next(r for r in rows if r["method"] == "none")["copies_hits"]
    names = [f"`{r['method']}`" for r in rows if r["method"] in PUBLISHED and r["copies_hits"] >= plain]
    if not names:
        return ""
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"\nPublished as effective on Stable Diffusion, but preventing nothing on this model at these settings: {listed}."


def speed() -> str:
    first, loops = read("first_step"), read("optimisation")
    rows = "; ".join(
        f"`{name}` {r['times_faster_median']:.2f} times faster ({r['mean_iterations']:.0f} iterations against "
        f"{r['mean_iterations_published']:.0f}; {r['reached_the_loss']:.0%} of the prompts reached the loss)"
        for name, r in loops.items()
        if isinstance(r, dict)
    )
    prompts = next(r["prompts"] for r in loops.values() if isinstance(r, dict))
    return f"""**Speed**, each pair side by side in one run on two CPU cores. First-step check of {first["prompts"]} prompts,
{first["images"]} image{"s" if first["images"] > 1 else ""} each, against the published procedure (every prompt alone, all 50 steps, decoding):
{first["times_faster"]:.0f} times faster, AUC {first["auc_first_step"]:.3f} against {first["auc_published"]:.3f}.
Conditioning optimisation against the published loop at equal loss ({prompts} prompts, {loops["images"]} images, median):
{rows}."""


def training() -> str:
    found = read("training_filter")
    rows = {row["arm"]: row for row in found["rows"]}
    head = [
        "arm",
        "pairs",
        "copies (95%)",
        "similarity (95%)",
        "stayed in the loss",
        "ordinary loss",
        "time (least–most)",
    ]
    lines = []
    for arm in found["arms"]:
        row, time = rows.get(arm["arm"]), arm["time_against_none"]
        trained = ["", "", "", "", ""]
        if row is not None:
            losses = arm["ordinary_loss"]
            trained = [
                str(row["pairs"]),
                with_interval(row["copies"]),
                with_interval(row["likeness"]),
                f"{row['stayed_in_the_loss']:.0%}",
                number(sum(losses) / len(losses), 3),
            ]
        lines.append([arm["arm"], *trained, f"{time['median']:.2f} ({time['least']:.2f}–{time['most']:.2f})"])
    seeds, kept = found["arms"][0]["seeds"], found["arms"][2]["ordinary_stayed_in_the_loss"]
    filtered, word = rows["filter"], rows["random word"]
    rounds, levels = found["arms"][0]["time_against_none"]["rounds"], found["noise_levels"]
    told = [level["auc"] for level in levels]
    repetitions = filtered["repetitions"]
    return f"""**Training filter**: the bundled model trained on for {found["steps"]} steps of {found["batch"]} on {found["pairs_of_each_count"]} new pairs
repeated {repetitions} times an epoch beside {found["ordinary_in_an_epoch"]} ordinary images; the seeds that all arms have finished ({", ".join(map(str, seeds))}), other pairs each.
Copies among {found["images_a_pair"]} image{"s" if found["images_a_pair"] > 1 else ""} a pair; intervals are bootstraps over the pairs; the loss is that on held-out
ordinary captions; time against no filter, median of {rounds} rounds in turns, of the processor's (load {found["load_when_timed"]:.1f}, two cores).

{table(head, lines)}

On the same pairs {against("the filter", filtered, "none", "no filter")}; {against("a random word", word, "none", "no filter")};
{against("the filter", filtered, "random word", "a random word")}.
The limit is the 99th percentile of ordinary captions before the training; {kept:.0%} of the ordinary samples' showings stayed
in the loss. The published limit (2, for Stable Diffusion's latents) lies below what ordinary captions give on this model.
The magnitude tells pairs that the bundled model was shown 20 and 50 times an epoch from ordinary captions with an AUC of {min(told):.2f} to
{max(told):.2f} at {len(levels)} noise levels, {told[0]:.2f} at the lowest: no level is left unmeasured."""


def against(what: str, row: dict[str, Any], arm: str, other: str) -> str:
    """Whether an arm left fewer copies than another, as far as the interval of the difference tells."""
    fewer, low, high = row[f"copies less than {arm}"]
    similarity = with_interval(row[f"likeness less than {arm}"])
    if low > 0:
        told = f"leaves fewer copies than {other}, by {with_interval([fewer, low, high])}"
    elif high < 0:
        told = f"leaves more copies than {other}, by {with_interval([-fewer, -high, -low])}"
    else:
        told = f"is not told from {other} by its copies, fewer by {with_interval([fewer, low, high])}"
    return f"{what} {told} (the other's similarity less its own: {similarity})"


def with_interval(values: Sequence[float]) -> str:
    mean, low, high = (f"{value:.2f}".replace("-", "−") for value in values)
    return f"{mean} ({low}–{high})" if low[0] != "−" else f"{mean} ({low} to {high})"


_LORAS = {
    "overfitted": "eight images 200 times each, and eight that it never saw",
    "repeated": "48 images, of which six 400 times each",
    "healthy": "64 images three times each",
}


def auditing() -> str:
    found = read("audit")
    speed = found["speed"]
    kinds = dict.fromkeys((row["model"], row["given"]) for row in found["worlds"])
    lines = []
    for model, given in kinds:
        rows = [row for row in found["worlds"] if (row["model"], row["given"]) == (model, given)]
        named, wrong = (", ".join(str(row[kind]) for row in rows) for kind in ("memorised named", "unseen named"))
        lines.append([model, given, f"{named} of {rows[0]['memorised']}", f"{wrong} of {rows[0]['unseen']}"])
    head = ["model", "given", "memorised ones named, a seed each", "unseen ones named"]
    loras = [
        [
            _LORAS[row["lora"]],
            f"{row['named']} of {row['shown often']}" if row["shown often"] else "",
            f"{row['others named']} of {row['others']}",
            ", ".join(f"{point['epoch']}: {point['named']} ({point['copies']})" for point in row["epochs"]),
        ]
        for row in found["loras"]
    ]
    lora_head = ["shown to the LoRA", "named of those shown often", "of the others", "named at an epoch (copies)"]
    return f"""**Audit** at a false discovery rate of {found["false_discovery_rate"]:g}: memorised pairs among images of the same world that the model never
saw, a seed each. The noise levels were chosen on the bundled model and a LoRA of it; that the statistic parts the second
model's pairs too had been seen once before.

{table(head, lines)}

LoRAs of the bundled model. Copies are of those shown often (of the first eight, for the healthy one), an image each.

{table(lora_head, loras)}

It measures {speed["captions_a_second"]:.1f} captions a second from their captions alone on one core, one image each, the published procedure
{speed["captions_a_second_published"]:.2f}: {speed["times_faster"]:.0f} times as many."""


MILLION = 1_000_000
WORKERS = (1, 8, 64)


def audit_scale() -> str:
    """Measured up to some thousand captions, and worked out for a million: a line through the two largest sizes."""
    found, rate = read("audit_scale"), read("audit")["speed"]["captions_a_second"]
    lines, plan = [], []
    for given in dict.fromkeys(row["given"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["given"] == given]
        for row in rows:
            memory, own, again = row["mib_at_most"], row["seconds"]["audit"], row["seconds"]["audit again"]
            lines.append(
                [
                    given,
                    f"{row['captions']:,}",
                    f"{memory:.0f}",
                    f"{row['mib_on_disk']:.0f}",
                    f"{own:.1f}",
                    f"{again:.1f}",
                ]
            )
        plan.append([given, *(_at_a_million(rows[-2:], of) for of in (_memory, _disk, _hours))])
    head = ["given", "captions", "memory, MiB", "ledger, MiB", "seconds", "seconds, nothing left to measure"]
    hours = ", ".join(f"{MILLION / rate / workers / 3600:,.1f} with {workers}" for workers in WORKERS)
    needs = "; ".join(
        f"{least_named(captions, 1000, 0.05):,} of {captions:,}" for captions in (10_000, 100_000, MILLION)
    )
    return f"""**An audit's size**, without a model (a stub gives values and pictures at once; {found["cpu"]}): the most memory beside what
is mapped from files, and the audit's own processor time.

{table(head, lines)}

Worked out from these for {MILLION:,} captions, on a line through the two largest sizes:

{table(["given", "memory, GiB", "ledger, GiB", "hours of the audit's own"], plan)}

The bundled model's {rate:.1f} captions a second on one core make hours beside these: {hours} such cores, if these share the
work evenly. Against 1,000 ordinary prompts, so many captions must stand out together to be named at 5%: {needs}. To name a
single one of {MILLION:,} takes {20 * MILLION - 1:,} ordinary prompts."""


def _at_a_million(rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
    first, second = rows
    slope = (value(second) - value(first)) / (second["captions"] - first["captions"])
    return f"{value(second) + slope * (MILLION - second['captions']):.1f}"


def _memory(row: dict[str, Any]) -> float:
    return float(row["mib_at_most"]) / 1024


def _disk(row: dict[str, Any]) -> float:
    return float(row["mib_on_disk"]) / 1024


def _hours(row: dict[str, Any]) -> float:
    return float(sum(row["seconds"].values()) - row["seconds"]["audit again"]) / 3600


def repairing() -> str:
    found = read("repair")

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.0%}"

    lines = [
        [
            str(row["seed"]),
            f"{row['before']['copies']} of {row['before']['drawn']}",
            f"{row['after']['copies']} of {row['after']['drawn']}",
            percent(row["after"]["likeness"]),
            f"{row['after']['way']}, {row['after']['kept']:g}",
            f"{row['before']['elsewhere']:.0%}, {row['after']['elsewhere']:.0%}",
            ", ".join(f"{row['follows'][of]:.2f}" for of in ("before", "after")),
        ]
        for row in found["loras"]
    ]
    head = [
        "LoRA",
        "copies before",
        "after",
        "likeness kept",
        "held back, kept",
        "copies of ordinary prompts, before and after",
        "what prompts ask for, before and after",
    ]
    points = [[(row["way"], row["kept"]) for row in lora["rows"]] for lora in found["loras"]]
    course = [
        [
            way,
            f"{kept:g}",
            *(f"{lora['rows'][n]['copies']}, {percent(lora['rows'][n]['likeness'])}" for lora in found["loras"]),
        ]
        for n, (way, kept) in enumerate(points[0])
    ]
    course_head = ["held back", "kept", *(str(lora["seed"]) for lora in found["loras"])]
    drawn = found["loras"][0]["rows"][0]["drawn"]
    return f"""**Repair** of LoRAs of the bundled model that copy: {found["images"]} images in two colours of their own, 40 times an epoch. Guidance is
{found["guidance"]:g}, with {found["steps"]} steps. Likeness is 100% as the LoRA and 0% as the base model; what prompts ask for
is a caption score, chance .5, the base model's own {found["follows"]:.2f}. The ways and their shares were chosen on LoRA 9000,
and LoRA 9500 was judged alone. Before and after are from other noises than
the course by which the repair chose.

{table(head, lines)}

The course: copies of {drawn} images, and likeness.

{table(course_head, course)}"""


def copied_parts() -> str:
    found = read("parts")["rows"]
    worlds = list(dict.fromkeys(row["world"] for row in found))
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in found) if kind != "none"]
    ways = ("anywhere", "against one")
    rows = {(row["world"], row["kind"]): row for row in found}
    lines = [
        [
            kind if kind != "none" else "nothing of the set",
            *(share(rows[w, kind][way], 2 if kind != "none" else 4) for w in worlds for way in ways),
        ]
        for kind in (*kinds, "none")
    ]
    named = {"anywhere": "in the set", "against one": "against its own"}
    strangers = {world: rows[world, "none"] for world in worlds}
    promised = "; ".join(
        ", ".join(f"{strangers[w]['levels'][way]:.4f} {named[way]}" for way in ways)
        + f" ({w} world; in one set up to {strangers[w]['highest']:.3f})"
        for w in worlds
    )
    head = ["what an image holds", *(f"{world}: {named[way]}" for world in worlds for way in ways)]
    return f"""**Copies of parts** by `grey`, in sets of {rows[worlds[0], kinds[0]]["anywhere"]["count"]} images: the share said to hold a copied part, of the right image,
after one way through the autoencoder. The windows and the score were chosen on the bundled model's world, nothing on the second.
Images that hold nothing of a set are asked about {strangers[worlds[0]]["sets"]} sets of each world, drawn anew.

{table(head, lines)}

What sets promise of images that hold nothing of them, by their own images, on average: {promised}.
A promise holds over sets: a single one, of which so few images are known, may be well above it."""


def batches() -> str:
    found = read("batches")
    kinds = list(dict.fromkeys(row["calibration"] for row in found["rows"]))
    sizes = sorted({row["batch"] for row in found["rows"]})
    lines = [
        [kind, f"{alpha:g}"]
        + [share(row, 3) for row in found["rows"] if (row["calibration"], row["alpha"]) == (kind, alpha)]
        for kind in kinds
        for alpha in sorted({row["alpha"] for row in found["rows"]})
    ]
    head = ["calibration", "alpha", *(f"batch of {size}" for size in sizes)]
    return f"""**Flags in a batch**: the share of {found["prompts"]:,} fresh ordinary captions of which any image is flagged, with Wilson's
95% interval.

{table(head, lines)}"""


def host_cost() -> str:
    found = read("on_a_card")
    pages = [
        f"{row['wall']['ratio']:.3f} with the page {row['page']} ({row['hooks']['ratio']:.3f} by the time in our hooks)"
        for row in found["B"]
    ]
    text = f"""**Cost in the hosts**, interleaved pairs of runs in one server, on against off, median wall ratio. ComfyUI on one
{found["card"]}, {found["B"][0]["wall"]["pairs"]} pairs of Stable Diffusion 1.5, 512 x 512, 20 steps:
{" and ".join(pages)}."""
    found = read("webui_cost")
    ratios = f"Automatic1111 {found['a1111']['median_ratio']:.3f}, Forge {found['forge']['median_ratio']:.3f}"
    return f"{text}\n{ratios} ({found['pairs']} pairs, {found['what']})."


PARTS: tuple[Callable[[], str], ...] = (
    detection,
    graded,
    explanation,
    calibration,
    second_world,
    batches,
    mitigation,
    training,
    auditing,
    audit_scale,
    repairing,
    copied_parts,
    speed,
    host_cost,
)


def main() -> None:
    path = ROOT / "docs" / "figures.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    figures = "\n\n".join(part for build in PARTS if (part := build()))
    path.write_text(f"{before}{BEGIN}\n{figures}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
