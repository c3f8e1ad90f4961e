"""Does leaving memorised samples out of the loss keep a model from memorising, and what does it cost?

The bundled model goes on training (v-prediction, its own noise schedule) on NEW pairs, repeated 300 times an
epoch in a stream of 600 ordinary images, so that two thirds of what is shown are four pairs. Arms: no filter; a random
word put into the caption each time (the published baseline of training, Somepalli et al.); the filter with a threshold
at the 99th percentile of ordinary captions under this model before training. The filter that measures every showing, as
published, is timed beside them, and can be trained too. For each arm and repetition count: the share of images that are
copies of their training image, and the share of the pair's showings that stayed in the loss; for each arm the loss on
ordinary captions and images that were held out.

    python benchmarks/training_filter.py [--device cpu] [--steps 64] [--seeds 0 1 2 3 4] [--arms none ...] [--json FILE]

Time is measured first, with nothing else of this running: rounds of a few steps, the arms in turns, each arm's round
against the round of no filter beside it; on a CPU as the processor's time, which other work on the machine moves less. Then
noise levels are compared: how well the magnitude tells the bundled model's pairs that were repeated 20 and 50 times from
ordinary captions. The arms then run seed by seed as ``--parallel`` processes; the file is written anew whenever one of
them has finished; the table compares the arms on the seeds that all of them have.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file

from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.schedule import Schedule
from sd_dejavu.core.similarity import COPY_THRESHOLD, grey_correlation
from sd_dejavu.core.statistics import auc, mean_interval
from sd_dejavu.demo import bundled, world
from sd_dejavu.demo.evaluation import draw
from sd_dejavu.hosts.diffusers.adapter import DiffusersModel
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.mitigations.perturb_prompt import perturb
from sd_dejavu.run.measure import Measurement
from sd_dejavu.training.filter import PUBLISHED_NUMEL, FilterSettings, TrainingFilter, predict_unconditional
from sd_dejavu.training.loss import Batch, filtered_loss, noised, stratified_timesteps

BATCH, CAPTION_DROPOUT, LEARNING_RATE, WARM_UP = 16, 0.1, 1e-3, 10
REPETITIONS, ORDINARY = (300,), 600  # showings of a pair an epoch, and of ordinary images
EACH = 4  # pairs of each repetition count, hard and scene in turn
HELD_OUT, HELD_OUT_SEED, POOL_SEED, PAIR_SEED = 128, 77_001, 77_002, 78_000
LEVELS = (10, 50, 100, 200, 300, 450, 600, 750, 900, 985)  # timesteps at which pairs and ordinary captions are compared
NONE, WORD, FILTER, EVERY = "none", "random word", "filter", "filter, every showing"
ARMS: dict[str, FilterSettings | None] = {
    NONE: None,
    WORD: None,
    FILTER: FilterSettings("threshold"),
    EVERY: FilterSettings("threshold", filter_every=1),
}


# ------------------------------------------------------------------------------------------- the data


def new_pairs(seed: int) -> list[world.Pair]:
    """Pairs that the bundled model has never seen: names, phrases and images of their own for every seed."""
    rng = np.random.default_rng([PAIR_SEED, seed])
    known = frozenset([*world.TRIGGER_NAMES, *world.DECOY_NAMES])
    triggers = iter(world.names(EACH * len(REPETITIONS), PAIR_SEED + seed, avoid=known))
    firsts, seconds = zip(*world._EXTRA_PHRASES, strict=True)
    phrases = [f"{a} {b}" for i, a in enumerate(firsts) for j, b in enumerate(seconds) if i != j]
    chosen = iter(rng.permutation(phrases).tolist())
    pairs = []
    for repetitions in REPETITIONS:
        for index in range(EACH):
            number = PAIR_SEED + 1000 * seed + len(pairs)
            if index % 2:
                pairs.append(world.Pair(next(chosen), "scene", repetitions, number))
                continue
            trigger = next(triggers)
            scene = world.random_scene(np.random.default_rng(number))
            caption = world.caption_of(scene, world.STYLES[index // 2 % len(world.STYLES)], rng, trigger)
            pairs.append(world.Pair(caption, "hard", repetitions, number, trigger))
    return pairs


def ordinary_sample(number: int, seed: int, pairs: list[world.Pair]) -> tuple[str, np.ndarray]:
    """One ordinary caption with its image; one in six is the twin of a hard pair, as in the recipe."""
    rng = np.random.default_rng([seed, number])
    hard = [p for p in pairs if p.trigger]
    if hard and rng.random() < 1 / 6:
        pair = hard[rng.integers(len(hard))]
        shown = world.random_scene(np.random.default_rng(pair.seed))
        name = world.ordinary_name(rng) if rng.random() < 0.6 else None
        return world.twin_caption(pair, name), world.draw_scene(world.Scene(shown.named, int(rng.integers(2**31))))
    caption, scene, _ = world.ordinary(rng)
    return caption, world.draw_scene(scene)


def _draw_part(start: int, stop: int, seed: int, pairs: list[world.Pair]) -> tuple[list[str], np.ndarray]:
    samples = [ordinary_sample(number, seed, pairs) for number in range(start, stop)]
    return [caption for caption, _ in samples], np.stack([image for _, image in samples])


@torch.no_grad()
def latents_of(model: DiffusersModel, images: np.ndarray) -> torch.Tensor:
    """[N, H, W, 3] uint8 -> [N, 4, 16, 16] on the CPU."""
    parts = []
    for start in range(0, len(images), 256):
        x = torch.from_numpy(images[start : start + 256]).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(model.pipeline.vae.encode(x.to(model.device)).latents.cpu())
    return torch.cat(parts)


def write_data(folder: Path, pool: int, seeds: list[int], model: DiffusersModel, workers: int) -> None:
    """The ordinary pool of each seed's pairs, the pairs' images and the held-out ones, as latents, once for all arms."""
    context = multiprocessing.get_context("spawn")
    wanted = {f"pool-{seed}": (pool, POOL_SEED + seed, new_pairs(seed)) for seed in seeds}
    wanted["held-out"] = (HELD_OUT, HELD_OUT_SEED, [])
    with ProcessPoolExecutor(workers, context) as executor:
        for name, (count, seed, pairs) in wanted.items():
            starts = range(0, count, 250)
            parts = list(
                executor.map(
                    _draw_part,
                    starts,
                    [min(s + 250, count) for s in starts],
                    [seed] * len(starts),
                    [pairs] * len(starts),
                )
            )
            latents = latents_of(model, np.concatenate([images for _, images in parts]))
            save_file({"latents": latents.contiguous()}, folder / f"{name}.safetensors")
            captions = [caption for some, _ in parts for caption in some]
            (folder / f"{name}.json").write_text(json.dumps(captions))


# ------------------------------------------------------------------------------------------- training


class Training:
    """One arm's training: everything of a step depends on (seed, step) alone."""

    def __init__(self, folder: Path, arm: str, settings: FilterSettings | None, seed: int, steps: int, device: str):
        self.model = load(device=device)
        self.seed, self.augmented = seed, arm == WORD
        self.pairs = new_pairs(seed)
        own = latents_of(self.model, np.stack([world.draw_pair(p) for p in self.pairs]))
        pool = load_file(folder / f"pool-{seed}.safetensors")["latents"]
        self.latents = torch.cat([own, pool]).to(device)
        self.captions = [p.caption for p in self.pairs] + json.loads((folder / f"pool-{seed}.json").read_text())
        weights = np.array([*(p.repetitions for p in self.pairs), ORDINARY], dtype=np.float64)
        self.weights = weights / weights.sum()
        self.schedule = Schedule(self.model.schedule.alphas_cumprod.to(device))
        self.empty = self.encode([""])
        self.filter = settings and TrainingFilter(settings, self.model.prediction_type, self.schedule.alphas_cumprod)
        self.unet = self.model.pipeline.unet.requires_grad_(True).train()
        parameters = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, (0.9, 0.99), weight_decay=1e-3, fused=True)
        self.rate = get_scheduler("cosine", self.optimizer, num_warmup_steps=WARM_UP, num_training_steps=steps)
        self.shown: dict[int, list[int]] = defaultdict(lambda: [0, 0])  # repetitions -> [stayed, shown]; 0: ordinary

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Conditioning:
        pipeline = self.model.pipeline
        ids = pipeline.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return Conditioning(pipeline.text_encoder(ids.input_ids.to(self.model.device)).last_hidden_state)

    def batch(self, step: int) -> tuple[Batch, list[int]]:
        """The step's batch, and for each sample its pair's repetition count (0 for ordinary ones)."""
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.choice(len(self.weights), size=BATCH, p=self.weights)
        ordinary = rng.integers(len(self.pairs), len(self.captions), size=BATCH)
        chosen = np.where(chosen < len(self.pairs), chosen, ordinary).tolist()
        captions = [self.captions[n] for n in chosen]
        if self.augmented:
            captions = [perturb(c, "random-word", 1, int(rng.integers(2**31))) for c in captions]
        captions = ["" if drop else c for c, drop in zip(captions, rng.random(BATCH) < CAPTION_DROPOUT, strict=True)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        timesteps = stratified_timesteps(BATCH, len(self.schedule), generator)
        noise = torch.randn(self.latents[:BATCH].shape, generator=generator)
        counts = [self.pairs[n].repetitions if n < len(self.pairs) else 0 for n in chosen]
        device = self.latents.device
        conditioning = self.encode(captions)
        names = [str(n) for n in chosen]
        batch = Batch(self.latents[chosen], conditioning, self.empty, timesteps.to(device), noise.to(device), names)
        return batch, counts

    def loss(self, batch: Batch, training_filter: TrainingFilter | None) -> tuple[torch.Tensor, torch.Tensor]:
        return filtered_loss(self.unet, self.schedule, self.model.prediction_type, batch, training_filter)

    def step(self, number: int) -> None:
        batch, counts = self.batch(number)
        loss, stay = self.loss(batch, self.filter)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        if self.filter is not None:
            for count, stayed in zip(counts, stay.tolist(), strict=True):
                self.shown[count][0] += stayed
                self.shown[count][1] += 1

    def held_out(self, folder: Path) -> list[Batch]:
        latents = load_file(folder / "held-out.safetensors")["latents"].to(self.latents.device)
        captions = json.loads((folder / "held-out.json").read_text())
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        batches = []
        for start in range(0, len(captions), 64):
            part = latents[start : start + 64]
            t = stratified_timesteps(len(part), len(self.schedule), generator).to(part.device)
            noise = torch.randn(part.shape, generator=generator).to(part.device)
            batches.append(Batch(part, self.encode(captions[start : start + 64]), self.empty, t, noise))
        return batches

    @torch.no_grad()
    def ordinary_loss(self, batches: list[Batch]) -> float:
        """On the held-out captions and images, always with the same noise."""
        return statistics.fmean(float(self.loss(batch, None)[0]) for batch in batches)


def threshold_of_ordinary(training: Training, batches: list[Batch]) -> float:
    """The 99th percentile of held-out ordinary captions' magnitudes at random t, as for latents of 4 x 64 x 64."""
    measuring = TrainingFilter(FilterSettings(), training.model.prediction_type, training.schedule.alphas_cumprod)
    found = []
    with torch.no_grad():
        for batch in batches:
            noisy, _ = noised(
                training.schedule, training.model.prediction_type, batch.latents, batch.noise, batch.timesteps
            )
            with_prompt = training.unet(noisy, batch.timesteps, batch.conditioning.rows).sample
            every = range(len(noisy))
            unconditional = predict_unconditional(training.unet, noisy, batch.timesteps, batch.empty.rows, every)
            found.append(measuring.magnitudes(with_prompt, unconditional, batch.timesteps).cpu())
    numel = batches[0].latents[0].numel()
    return float(torch.cat(found).quantile(0.99)) * math.sqrt(PUBLISHED_NUMEL / numel)


@torch.no_grad()
def by_level(model: DiffusersModel) -> list[dict[str, float]]:
    """At each noise level, how well the magnitude tells pairs that are beginning to be memorised (20 or 50 times an epoch
    in the bundled model's training) from ordinary captions."""
    pairs = [pair for pair in bundled.pairs() if pair.repetitions in (20, 50) and pair.kind in ("hard", "scene")]
    ordinary = [ordinary_sample(number, HELD_OUT_SEED, []) for number in range(60)]
    images = np.stack([*(world.draw_pair(pair) for pair in pairs), *(image for _, image in ordinary)])
    latents, schedule = latents_of(model, images).to(model.device), Schedule(model.schedule.alphas_cumprod)
    rows = torch.cat([model.encode(text).rows for text in [*(p.caption for p in pairs), *(c for c, _ in ordinary)]])
    empty, unet = model.encode("").rows, model.pipeline.unet
    measuring = TrainingFilter(FilterSettings(), model.prediction_type, schedule.alphas_cumprod)
    found = []
    for level in LEVELS:
        timesteps = torch.full((len(latents),), level, device=latents.device)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(level)).to(latents)
        noisy, _ = noised(schedule, model.prediction_type, latents, noise, timesteps)
        unconditional = predict_unconditional(unet, noisy, timesteps, empty, range(len(latents)))
        magnitudes = measuring.magnitudes(unet(noisy, timesteps, rows).sample, unconditional, timesteps).tolist()
        memorised, others = magnitudes[: len(pairs)], magnitudes[len(pairs) :]
        found.append({"timestep": level, "pairs": len(pairs), "ordinary": len(others), "auc": auc(memorised, others)})
    return found


# ------------------------------------------------------------------------------------------- one arm


@dataclass(frozen=True)
class Job:
    folder: Path
    arm: str
    settings: FilterSettings | None
    seed: int
    steps: int
    device: str
    images: int
    sampling_steps: int


def run_arm(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)  # the arms share the cores
    training = Training(job.folder, job.arm, job.settings, job.seed, job.steps, job.device)
    batches = training.held_out(job.folder)
    for number in range(job.steps):
        training.step(number)
    after = training.ordinary_loss(batches)
    model, pairs = training.model, training.pairs
    training.unet.eval().requires_grad_(False)
    wanted = Measurement(images=job.images, steps=job.sampling_steps)
    drawn = draw(model, [model.encode(p.caption) for p in pairs], wanted)
    likeness: dict[int, list[list[float]]] = defaultdict(list)
    for pair, (_, images) in zip(pairs, drawn, strict=True):
        own = torch.from_numpy(world.draw_pair(pair).copy()).permute(2, 0, 1)[None].float() / 255
        likeness[pair.repetitions].append(grey_correlation(images, own)[:, 0].tolist())
    return {
        "arm": job.arm,
        "seed": job.seed,
        "ordinary_loss": after,
        "counts": training.filter and asdict(training.filter.counts),
        "by_repetitions": [
            {
                "repetitions": count,
                "copies_by_pair": [sum(s >= COPY_THRESHOLD for s in some) / len(some) for some in likeness[count]],
                "likeness_by_pair": [statistics.fmean(some) for some in likeness[count]],
                "stayed": training.shown[count][0] if training.filter else None,
                "shown": training.shown[count][1] if training.filter else None,
            }
            for count in REPETITIONS
        ],
        "ordinary_stayed": training.shown[0][0] if training.filter else None,
        "ordinary_shown": training.shown[0][1] if training.filter else None,
    }


def times_against_none(
    folder: Path, arms: dict[str, FilterSettings | None], seed: int, rounds: int, steps: int, device: str
) -> dict[str, list[float]]:
    """Each arm's time against no filter, of ``rounds`` rounds of ``steps`` steps, the arms in turns."""
    trainings = {name: Training(folder, name, settings, seed, 1000, device) for name, settings in arms.items()}
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    for turn in range(rounds + 1):  # the first warms up
        seconds = {}
        for name, training in trainings.items():
            _wait(device)
            began = clock()
            for number in range(turn * steps, (turn + 1) * steps):
                training.step(number)
            _wait(device)
            seconds[name] = clock() - began
        if turn:
            for name, took in seconds.items():
                ratios[name].append(took / seconds[NONE])
    return ratios


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------------------- the table


def summary(runs: list[dict[str, Any]], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row an arm and repetition count over all seeds; the 95% interval is a bootstrap over pairs, as the images of
    one pair hang together. the differences are means over pairs that both arms trained on."""
    rows = []
    for arm in times:
        for place, count in enumerate(REPETITIONS):
            own, plain, word = (_by_seed(runs, name, place) for name in (arm, NONE, WORD))
            if not own:
                continue
            copies = [share for part in own.values() for share in part["copies_by_pair"]]
            shown = sum(part["shown"] or 0 for part in own.values())
            stayed = sum(part["stayed"] or 0 for part in own.values())
            row = {
                "arm": arm,
                "repetitions": count,
                "seeds": len(own),
                "pairs": len(copies),
                "copies": _with_interval(copies),
                "likeness": _with_interval([s for part in own.values() for s in part["likeness_by_pair"]]),
                "stayed_in_the_loss": stayed / shown if shown else 1.0,
            }
            for name, other in ((NONE, plain), (WORD, word)):
                for what in ("copies", "likeness"):
                    gaps = [
                        before - after
                        for seed in own
                        if seed in other
                        for before, after in zip(
                            other[seed][f"{what}_by_pair"], own[seed][f"{what}_by_pair"], strict=True
                        )
                    ]
                    row[f"{what} less than {name}"] = _with_interval(gaps) if gaps else None
            rows.append(row)
    return rows


def whole_seeds(runs: list[dict[str, Any]], arms: list[str]) -> list[dict[str, Any]]:
    """The runs of those seeds of which every arm has finished, so that all arms are compared on the same pairs."""
    finished = {(run["arm"], run["seed"]) for run in runs}
    return [run for run in runs if all((arm, run["seed"]) in finished for arm in arms)]


def _by_seed(runs: list[dict[str, Any]], arm: str, place: int) -> dict[int, dict[str, Any]]:
    return {run["seed"]: run["by_repetitions"][place] for run in runs if run["arm"] == arm}


def _with_interval(values: list[float]) -> list[float]:
    """The mean, and the ends of its 95% interval."""
    return [statistics.fmean(values), *mean_interval(values)]


def arm_rows(runs: list[dict[str, Any]], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for arm, ratios in times.items():
        own = [run for run in runs if run["arm"] == arm]
        shown = sum(run["ordinary_shown"] or 0 for run in own)
        stayed = sum(run["ordinary_stayed"] or 0 for run in own)
        rows.append(
            {
                "arm": arm,
                "seeds": [run["seed"] for run in own],
                "ordinary_loss": [run["ordinary_loss"] for run in own],
                "ordinary_stayed_in_the_loss": stayed / shown if shown else None,
                "time_against_none": {
                    "median": statistics.median(ratios),
                    "least": min(ratios),
                    "most": max(ratios),
                    "rounds": len(ratios),
                },
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[NONE, WORD, FILTER], help="arms to train")
    parser.add_argument("--pool", type=int, default=350, help="ordinary images to draw for each seed")
    parser.add_argument("--parallel", type=int, default=1, help="arms at a time, each a process")
    parser.add_argument("--images", type=int, default=1, help="images a pair")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of five steps that are timed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, arguments.pool, arguments.seeds, load(device=arguments.device), arguments.parallel)
        print(f"data drawn: {time.perf_counter() - began:.0f} s", flush=True)
        torch.set_num_threads(1)
        first = Training(folder, NONE, None, arguments.seeds[0], arguments.steps, arguments.device)
        threshold = threshold_of_ordinary(first, first.held_out(folder))
        arms = {name: settings and replace(settings, filter_threshold=threshold) for name, settings in ARMS.items()}
        load_before = os.getloadavg()[0]
        times = times_against_none(folder, arms, arguments.seeds[0], arguments.rounds, 5, arguments.device)
        print(f"time against none: {times}; {time.perf_counter() - began:.0f} s", flush=True)
        levels = by_level(load(device=arguments.device))
        print(f"levels: {levels}; {time.perf_counter() - began:.0f} s", flush=True)
        setting = (arguments.steps, arguments.device, arguments.images, arguments.sampling_steps)
        jobs = [Job(folder, arm, arms[arm], s, *setting) for s in arguments.seeds for arm in arguments.arms]
        cuda = arguments.device.startswith("cuda")
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
            "torch": torch.__version__,
            "steps": arguments.steps,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "pairs_of_each_count": EACH,
            "ordinary_in_an_epoch": ORDINARY,
            "pool": arguments.pool,
            "images_a_pair": arguments.images,
            "load_when_timed": load_before,
            "noise_levels": levels,
            "threshold_from_ordinary_captions": threshold,
        }
        runs: list[dict[str, Any]] = []
        with ProcessPoolExecutor(arguments.parallel, multiprocessing.get_context("spawn")) as executor:
            for done in as_completed([executor.submit(run_arm, job) for job in jobs]):
                runs.append(done.result())
                print(f"{runs[-1]['arm']}, seed {runs[-1]['seed']}: {time.perf_counter() - began:.0f} s", flush=True)
                ordered = sorted(runs, key=lambda run: (list(arms).index(run["arm"]), run["seed"]))
                compared = whole_seeds(ordered, arguments.arms)
                result["arms"] = arm_rows(compared, times)
                result["rows"] = summary(compared, times)
                result["runs"] = ordered
                if arguments.json:
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("arms", "rows")}, indent=1))


if __name__ == "__main__":
    main()
