"""Does leaving memorised samples out of the loss keep a model from memorising, and what does it cost?

The bundled model goes on training by its own recipe (v-prediction, the same noise schedule, pairs repeated in a
stream of ordinary images) on NEW pairs, which are repeated 1, 5, 20, 50, 100 and 300 times an epoch. Arms: no
filter; a random word put into the caption each time (the published baseline of training, Somepalli et al.); the
filter with the published threshold, with a threshold at the 99th percentile of ordinary captions under this model
before training, and with two running quantiles. For each arm and repetition count: the share of images that are
copies of their training image, and the share of the pair's showings that stayed in the loss; for each arm: the loss
on ordinary captions and images that were held out, how images follow their captions, and seconds a step.

    python benchmarks/training_filter.py [--device cpu] [--steps 1500] [--seeds 0 1] [--arms none ...] [--parallel 1]
        [--json FILE]

Seconds a step are measured first, one arm after the other in turns, with nothing else running. The arms then run
as ``--parallel`` processes; the file is written anew whenever one of them has finished.
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
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.schedule import Schedule
from sd_dejavu.core.similarity import COPY_THRESHOLD, grey_correlation
from sd_dejavu.demo import world
from sd_dejavu.demo.evaluation import Share, draw, ordinary_caption_score
from sd_dejavu.hosts.diffusers.adapter import DiffusersModel
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.mitigations.perturb_prompt import perturb
from sd_dejavu.run.measure import Measurement
from sd_dejavu.training.filter import PUBLISHED_NUMEL, FilterSettings, TrainingFilter, predict_unconditional
from sd_dejavu.training.loss import Batch, filtered_loss, noised, stratified_timesteps

BATCH, CAPTION_DROPOUT, LEARNING_RATE, WARM_UP, EMA = 32, 0.1, 1e-3, 100, 0.999
EACH = 8  # pairs of each repetition count, hard and scene in turn
HELD_OUT, HELD_OUT_SEED, POOL_SEED, PAIR_SEED = 512, 77_001, 77_002, 78_000
FROM_ORDINARY = "threshold, from ordinary captions"
ARMS: dict[str, FilterSettings | None] = {
    "none": None,
    "random word": None,
    "threshold, published": FilterSettings("threshold"),
    FROM_ORDINARY: FilterSettings("threshold"),
    "quantile .90": FilterSettings("quantile", filter_quantile=0.90),
    "quantile .75": FilterSettings("quantile", filter_quantile=0.75),
}


# ------------------------------------------------------------------------------------------- the data


def new_pairs(seed: int) -> list[world.Pair]:
    """Pairs that the bundled model has never seen: names, phrases and images of their own for every seed."""
    rng = np.random.default_rng([PAIR_SEED, seed])
    known = frozenset([*world.TRIGGER_NAMES, *world.DECOY_NAMES])
    triggers = iter(world.names(EACH * len(world.GRADED_REPETITIONS), PAIR_SEED + seed, avoid=known))
    firsts, seconds = zip(*world._EXTRA_PHRASES, strict=True)
    phrases = [f"{a} {b}" for i, a in enumerate(firsts) for j, b in enumerate(seconds) if i != j]
    chosen = iter(rng.permutation(phrases).tolist())
    pairs = []
    for repetitions in world.GRADED_REPETITIONS:
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
        self.seed, self.augmented = seed, arm == "random word"
        self.pairs = new_pairs(seed)
        own = latents_of(self.model, np.stack([world.draw_pair(p) for p in self.pairs]))
        pool = load_file(folder / f"pool-{seed}.safetensors")["latents"]
        self.latents = torch.cat([own, pool]).to(device)
        self.captions = [p.caption for p in self.pairs] + json.loads((folder / f"pool-{seed}.json").read_text())
        weights = np.array([*(p.repetitions for p in self.pairs), world.ORDINARY_PER_EPOCH], dtype=np.float64)
        self.weights = weights / weights.sum()
        self.schedule = Schedule(self.model.schedule.alphas_cumprod.to(device))
        self.empty = self.encode([""])
        self.filter = settings and TrainingFilter(settings, self.model.prediction_type, self.schedule.alphas_cumprod)
        self.unet = self.model.pipeline.unet.requires_grad_(True).train()
        parameters = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, (0.9, 0.99), weight_decay=1e-3, fused=True)
        self.rate = get_scheduler("cosine", self.optimizer, num_warmup_steps=WARM_UP, num_training_steps=steps)
        self.ema = EMAModel(parameters, decay=EMA, foreach=True)
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
        return Batch(self.latents[chosen], conditioning, self.empty, timesteps.to(device), noise.to(device)), counts

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
        self.ema.step(self.unet.parameters())
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
        """Of the averaged weights, on the held-out captions and images, always with the same noise."""
        self.ema.store(self.unet.parameters())
        self.ema.copy_to(self.unet.parameters())
        losses = [float(self.loss(batch, None)[0]) for batch in batches]
        self.ema.restore(self.unet.parameters())
        return statistics.fmean(losses)


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
            unconditional = predict_unconditional(training.unet, noisy, batch.timesteps, batch.empty.rows)
            found.append(measuring.magnitudes(with_prompt, unconditional, batch.timesteps).cpu())
    numel = batches[0].latents[0].numel()
    return float(torch.cat(found).quantile(0.99)) * math.sqrt(PUBLISHED_NUMEL / numel)


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
    losses = [[0, training.ordinary_loss(batches)]]
    for number in range(job.steps):
        training.step(number)
        if (number + 1) % max(1, job.steps // 5) == 0 or number + 1 == job.steps:
            losses.append([number + 1, training.ordinary_loss(batches)])
    training.ema.copy_to(training.unet.parameters())
    model, pairs = training.model, training.pairs
    training.unet.eval().requires_grad_(False)
    wanted = Measurement(images=job.images, steps=job.sampling_steps)
    drawn = draw(model, [model.encode(p.caption) for p in pairs], wanted)
    likeness, scores = defaultdict(list), defaultdict(list)
    for pair, (measured, images) in zip(pairs, drawn, strict=True):
        own = torch.from_numpy(world.draw_pair(pair).copy()).permute(2, 0, 1)[None].float() / 255
        likeness[pair.repetitions] += grey_correlation(images, own)[:, 0].tolist()
        if measured.scores is not None:
            scores[pair.repetitions] += measured.scores.tolist()
    hard = [p for p in pairs if p.trigger]
    return {
        "arm": job.arm,
        "seed": job.seed,
        "ordinary_loss": losses,
        "caption_score": ordinary_caption_score(model, replace(wanted, images=1), hard),
        "counts": training.filter and asdict(training.filter.counts),
        "by_repetitions": [
            {
                "repetitions": count,
                "hits": sum(s >= COPY_THRESHOLD for s in likeness[count]),
                "images": len(likeness[count]),
                "likeness": statistics.fmean(likeness[count]),
                "score": statistics.fmean(scores[count]) if scores[count] else None,
                "stayed": training.shown[count][0] if training.filter else None,
                "shown": training.shown[count][1] if training.filter else None,
            }
            for count in world.GRADED_REPETITIONS
        ],
        "ordinary_stayed": training.shown[0][0] if training.filter else None,
        "ordinary_shown": training.shown[0][1] if training.filter else None,
    }


def seconds_a_step(
    folder: Path, arms: dict[str, FilterSettings | None], seed: int, steps: int, device: str
) -> dict[str, float]:
    """Median of ``steps`` steps of each arm, in turns, so that a slower moment of the machine is one for all."""
    trainings = {name: Training(folder, name, settings, seed, 10 * steps, device) for name, settings in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(steps + 3):
        for name, training in trainings.items():
            _wait(device)
            began = time.perf_counter()
            training.step(number)
            _wait(device)
            if number >= 3:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------------------- the table


def summary(runs: list[dict[str, Any]], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """One row an arm and repetition count over all seeds, with Wilson's 95% interval of the share of copies."""
    rows = []
    for arm in seconds:
        own = [run for run in runs if run["arm"] == arm]
        for place, count in enumerate(world.GRADED_REPETITIONS if own else ()):
            parts = [run["by_repetitions"][place] for run in own]
            copies = Share(sum(p["hits"] for p in parts), sum(p["images"] for p in parts))
            shown = sum(p["shown"] or 0 for p in parts)
            rows.append(
                {
                    "arm": arm,
                    "repetitions": count,
                    "copies": copies.share,
                    "copies_low": copies.interval[0],
                    "copies_high": copies.interval[1],
                    "likeness": statistics.fmean(p["likeness"] for p in parts),
                    "score": statistics.fmean(p["score"] for p in parts) if parts[0]["score"] is not None else None,
                    "stayed_in_the_loss": sum(p["stayed"] or 0 for p in parts) / shown if shown else 1.0,
                }
            )
    return rows


def arm_rows(runs: list[dict[str, Any]], seconds: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for arm in seconds:
        own = [run for run in runs if run["arm"] == arm]
        if own:
            often = [p for run in own for p in run["by_repetitions"] if p["repetitions"] >= 50]
            shown = sum(run["ordinary_shown"] or 0 for run in own)
            final = [run["ordinary_loss"][-1][1] for run in own]
            rows.append(
                {
                    "arm": arm,
                    "seeds": len(own),
                    "copies_from_50_repetitions": str(
                        Share(sum(p["hits"] for p in often), sum(p["images"] for p in often))
                    ),
                    "ordinary_loss": statistics.fmean(final),
                    "ordinary_loss_by_seed": final,
                    "caption_score": statistics.fmean(run["caption_score"] for run in own),
                    "ordinary_stayed_in_the_loss": (
                        sum(run["ordinary_stayed"] or 0 for run in own) / shown if shown else 1.0
                    ),
                    "seconds_a_step": seconds[arm],
                    "seconds_against_none": seconds[arm] / seconds["none"],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="'none' among them")
    parser.add_argument("--pool", type=int, default=20_000, help="ordinary images to draw for each seed")
    parser.add_argument("--parallel", type=int, default=1, help="arms at a time, each a process")
    parser.add_argument("--images", type=int, default=4, help="images a pair")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--timed-steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, arguments.pool, arguments.seeds, load(device=arguments.device), os.cpu_count() or 1)
        print(f"data drawn: {time.perf_counter() - began:.0f} s", flush=True)
        first = Training(folder, "none", None, arguments.seeds[0], arguments.steps, arguments.device)
        threshold = threshold_of_ordinary(first, first.held_out(folder))
        every = {**ARMS, FROM_ORDINARY: FilterSettings("threshold", filter_threshold=threshold)}
        arms = {name: settings for name, settings in every.items() if name in arguments.arms or name == "none"}
        seconds = seconds_a_step(folder, arms, arguments.seeds[0], arguments.timed_steps, arguments.device)
        print(f"seconds a step: {seconds}; {time.perf_counter() - began:.0f} s", flush=True)
        setting = (arguments.steps, arguments.device, arguments.images, arguments.sampling_steps)
        jobs = [Job(folder, arm, settings, s, *setting) for s in arguments.seeds for arm, settings in arms.items()]
        cuda = arguments.device.startswith("cuda")
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
            "torch": torch.__version__,
            "steps": arguments.steps,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "seeds": arguments.seeds,
            "pairs_of_each_count": EACH,
            "pool": arguments.pool,
            "threshold_from_ordinary_captions": threshold,
        }
        runs: list[dict[str, Any]] = []
        with ProcessPoolExecutor(arguments.parallel, multiprocessing.get_context("spawn")) as executor:
            for done in as_completed([executor.submit(run_arm, job) for job in jobs]):
                runs.append(done.result())
                print(f"{runs[-1]['arm']}, seed {runs[-1]['seed']}: {time.perf_counter() - began:.0f} s", flush=True)
                ordered = sorted(runs, key=lambda run: (list(arms).index(run["arm"]), run["seed"]))
                result["arms"] = arm_rows(ordered, seconds)
                result["rows"] = summary(ordered, seconds)
                result["runs"] = ordered
                if arguments.json:
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("arms", "rows")}, indent=1))


if __name__ == "__main__":
    main()
