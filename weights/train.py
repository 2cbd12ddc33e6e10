"""Train the miniature: `python -m weights.train vae`, then `unet`, then `export`.

Everything between the commands lies in one folder (`--work`): the rendered scenes, the checkpoints, contact sheets and
a log. A command that finds its own checkpoint goes on from it. Learning rates follow the share of the budget used,
`--steps` or `--minutes`, whichever is nearer its end, so a run ends well annealed on any machine. On a CUDA device the
scenes lie in its memory and `--compile` compiles the UNet; on a CPU the same commands take days.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiffedit.clip import CLIPConfig, CLIPText
from minidiffedit.ddim import alpha_bar, levels, move, noises
from minidiffedit.fast import choose_device
from minidiffedit.tokenizer import EOS, Tokenizer
from minidiffedit.unet import UNet, UNetConfig
from minidiffedit.vae import VAE, VAEConfig

from . import scenes
from .export import export
from .scenes import Scene
from .shell import above_0, count, count_or_0, run_command

HERE = Path(__file__).parent

# Narrow where the picture is large: at 192 x 192 a convolution's time goes with the square of its width.
VAE_CONFIG = VAEConfig(block_out_channels=(32, 64, 128, 128), layers_per_block=1, norm_num_groups=8)
TEXT_WIDTH = 64
CLIP_CONFIG = CLIPConfig(hidden_size=TEXT_WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256)
UNET_CONFIG = UNetConfig(
    block_out_channels=(64, 128, 256), layers_per_block=1, cross_attention_dim=TEXT_WIDTH, attention_head_dim=4,
    norm_num_groups=16, sample_size=24,
)  # fmt: skip

RECIPE = {
    "vae": (10_000, 32, 1e-3),
    "unet": (15_000, 256, 8e-4),
}  # steps, batch, largest learning rate; how weights/mini was made: its card
KL_WEIGHT = 5e-4  # light: keeps the latents near unit size and the decoder calm under small errors of the UNet
# Deviation of the scaled latents. More cells show an object through more noise (Hoogeboom et al., 2301.11093; Chen,
# 2301.10972), so that at a given timestep masks and edits act less; 24 cells for 16 ask for about 16 / 24.
LATENT_SCALE = 0.625
THING_WEIGHT = 1.0  # added to a pixel's weight where a thing is: things are smaller than places, and looked at more
SNR_LIMIT, RAREST = 5.0, 0.25  # see drawing_weights
CAPTION_DROP = 0.10  # captions replaced by "", for guidance
PLACE_DROP = 0.15  # captions that name the things only
UNKNOWN_RATE = 0.2  # captions that get one unknown word somewhere, so that its row learns to say nothing
UNKNOWN_ID = 0  # the token "!", which no caption has; its row is copied to every token never seen


# --- scenes as arrays ---


def training_scenes(count: int) -> list[Scene]:
    """The first `count` scenes of the training seeds that are not held out."""
    return list(islice((s for s in map(scenes.scene, scenes.TRAIN_SEEDS) if not scenes.is_held_out(s)), count))


def evaluation_scenes(count: int) -> list[Scene]:
    return [scenes.scene(seed) for seed in scenes.EVAL_SEEDS[:count]]


def pixels_and_alpha(s: Scene) -> np.ndarray:
    """(192, 192, 4) uint8: the picture and where its things are."""
    return np.dstack([s.picture(), np.rint(s.alpha() * 255).astype(np.uint8)])


def rendered(path: Path, chosen: list[Scene]) -> np.ndarray:
    """Scenes as (n, 192, 192, 4) uint8, mapped from a file that is drawn once."""
    if not path.exists():
        part = path.with_suffix(".part")
        shape = (len(chosen), scenes.SIDE, scenes.SIDE, 4)
        array = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        with ProcessPoolExecutor() as pool:
            drawn = pool.map(pixels_and_alpha, chosen, chunksize=64)
            for i, picture in enumerate(tqdm(drawn, "drawing scenes", len(chosen), disable=None)):
                array[i] = picture
        array.flush()
        os.replace(part, path)
    return np.load(path, mmap_mode="c")  # private to this process, so that torch may share it


def training_pictures(args: argparse.Namespace) -> Tensor:
    """(n, 192, 192, 4) uint8: on a CUDA device in its memory, 150 kB each, else left in the file."""
    data = rendered(args.work / f"scenes-{args.scenes}.npy", training_scenes(args.scenes))
    return torch.from_numpy(data).to(args.device)


def to_input(pictures: np.ndarray | Tensor, device: str | torch.device) -> Tensor:
    """(b, 192, 192, 3) uint8 -> (b, 3, 192, 192) float32 in [-1, 1], channels last in memory."""
    return torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x: Tensor) -> np.ndarray:
    """(b, 3, H, W) about [-1, 1] -> (b, H, W, 3) uint8."""
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_sheet(rows: list[np.ndarray], path: Path) -> None:
    """rows of pictures, each (n, H, W, 3) uint8 -> one PNG."""
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)).save(path)


# --- the training loop both networks share ---


class Average:
    """Exponential moving average of a module's parameters; young averages forget faster."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(module.state_dict().values()), 1 - decay)


def save_atomic(value: object, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(value, part)
    os.replace(part, path)


class Run:
    """One training run: optimiser, schedule, average, checkpoint and log around a loss.

    The random numbers of a step depend on seed, step and kind of device only, so a resumed run sees what an unbroken
    one would.
    """

    def __init__(self, name: str, module: nn.Module, rate: float, args: argparse.Namespace):
        self.name, self.module, self.rate, self.args = name, module, rate, args
        self.path = args.work / f"{name}.pt"
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.average = Average(module, decay=0.999)
        self.step, self.seconds, self.threads = 0, 0.0, torch.get_num_threads()
        if self.path.exists():
            saved = torch.load(self.path, map_location=args.device, weights_only=True)
            module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for group in self.optimizer.param_groups:
                group["fused"] = True
            self.average.values = saved["average"]
            self.step, self.seconds = saved["step"], saved["seconds"]

    def progress(self) -> float:
        """The share of the budget used, 0 to 1."""
        return min(1.0, max(self.step / self.args.steps, self.seconds / (60 * self.args.minutes)))

    def steps(self) -> Iterator[torch.Generator]:
        """Yields one generator per step until the budget is used; the caller calls `learn` once for each."""
        saved_at = time.monotonic()
        bar = tqdm(total=100, desc=self.name, disable=None, bar_format="{desc} {percentage:.0f}% {postfix}")
        while self.progress() < 1:
            start = time.monotonic()
            if self.args.polite:
                make_room(self.threads)
            warmup = min(1.0, (self.step + 1) / 200)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress())))
            yield torch.Generator(self.args.device).manual_seed(self.args.seed * 10**7 + self.step)
            self.step += 1
            self.seconds += time.monotonic() - start
            bar.n = round(100 * self.progress())
            bar.set_postfix(step=self.step)
            if time.monotonic() - saved_at > 180 or self.progress() == 1:
                self.save()
                saved_at = time.monotonic()

    def learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.module, self.step)

    def save(self) -> None:
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "average": self.average.values, "step": self.step, "seconds": self.seconds}  # fmt: skip
        save_atomic(state, self.path)

    def log(self, **values: float) -> None:
        line = {"step": self.step, "minutes": round(self.seconds / 60, 1)}
        line |= {key: round(value, 5) for key, value in values.items()}
        print(json.dumps(line), flush=True)
        with open(self.args.work / f"{self.name}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def make_room(threads: int) -> None:
    """Work on one thread while another program runs, on all otherwise (Linux).

    Threads wait for one another in every layer: two on one and a half processors are slower than one on one.
    """
    running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    wanted = 1 if running > 1 else threads
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)


def half_precision(args: argparse.Namespace) -> torch.autocast:
    """bfloat16 in convolutions and products, where the processor has it in hardware 1.6 to 2.4 times as fast."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=not args.float32)


# --- the autoencoder ---


def load_vae(args: argparse.Namespace) -> VAE:
    """The averaged VAE of a run, for use."""
    vae = VAE(VAE_CONFIG).to(args.device).eval().requires_grad_(False)
    vae.load_state_dict(torch.load(args.work / "vae.pt", map_location=args.device, weights_only=True)["average"])
    return vae.to(memory_format=torch.channels_last)


def vae_loss(vae: VAE, x: Tensor, alpha: Tensor, noise: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """x (b, 3, H, W) in [-1, 1], alpha (b, 1, H, W) -> (loss, KL per latent number)."""
    with half_precision(args):
        mean, log_variance = vae.encode(x)
        mean, log_variance = mean.float(), log_variance.float()
        y = vae.decode(mean + (0.5 * log_variance).exp() * noise).float()
    weight = 1 + THING_WEIGHT * alpha
    loss = (weight * ((y - x).abs() + 2 * (y - x).square())).mean()
    for dim in (2, 3):  # the same of the differences of neighbours: edges stay crisp
        loss = loss + 0.5 * (weight.narrow(dim, 1, x.shape[dim] - 1) * (y.diff(dim=dim) - x.diff(dim=dim)).abs()).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss + KL_WEIGHT * kl, kl


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the pictures (n, H, W, 3) uint8 of their PSNR in dB."""
    error = np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / error)).mean())


@torch.no_grad()
def judge_vae(vae: VAE, args: argparse.Namespace, count: int = 64) -> float:
    """PSNR of the round trip over evaluation scenes, by the posterior's mean; saves a contact sheet of 16."""
    pictures = np.stack([s.picture() for s in evaluation_scenes(count)])
    decoded = [to_pictures(vae.decode(vae.encode(to_input(p, args.device))[0])) for p in np.array_split(pictures, 8)]
    back = np.concatenate(decoded)
    save_sheet([pictures[:8], back[:8], pictures[8:16], back[8:16]], args.work / "vae.png")
    return psnr(pictures, back)


def train_vae(args: argparse.Namespace) -> None:
    data = training_pictures(args)
    vae = VAE(VAE_CONFIG).to(args.device, memory_format=torch.channels_last)
    print(f"VAE: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters", flush=True)
    run = Run("vae", vae, args.rate, args)
    averaged = VAE(VAE_CONFIG).to(args.device, memory_format=torch.channels_last).eval()
    for rng in run.steps():
        batch = data[torch.randint(len(data), (args.batch,), generator=rng, device=rng.device)]
        x, alpha = to_input(batch[..., :3], args.device), batch[..., 3].to(args.device)[:, None] / 255
        shape = args.batch, 4, x.shape[2] // 8, x.shape[3] // 8
        loss, kl = vae_loss(vae, x, alpha, torch.randn(shape, generator=rng, device=rng.device), args)
        run.learn(loss)
        if run.step % 100 == 0:
            run.log(loss=loss.item(), kl=kl.item())
        if run.step % 2000 == 500:
            averaged.load_state_dict(run.average.values)
            run.log(psnr=judge_vae(averaged, args))
    run.save()
    run.log(psnr=judge_vae(load_vae(args), args, count=256))


# --- the text encoder and the UNet, together ---


class Denoiser(nn.Module):
    """Noisy latents, timesteps and token ids to the predicted noise."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = CLIPText(CLIP_CONFIG)
        self.unet = UNet(UNET_CONFIG)
        nn.init.normal_(self.text_encoder.embeddings.token_embedding.weight, std=0.3)
        nn.init.normal_(self.text_encoder.embeddings.position_embedding.weight, std=0.1)
        for name, p in self.unet.named_parameters():
            if name.split(".")[-2] in ("conv2", "proj_out", "conv_out"):  # every residual branch starts at nothing
                nn.init.zeros_(p)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.text_encoder(ids))


def begin_from(folder: Path, model: Denoiser, factor: float) -> None:
    """Fill the networks from a miniature's folder. Where its latents are scaled by another factor, what it knows of a
    timestep is moved to the one of the same signal-to-noise ratio; its first layer takes the square root of the change.
    """
    files = {"text_encoder/model": model.text_encoder, "unet/diffusion_pytorch_model": model.unet}
    for name, network in files.items():
        weights = load_file(folder / f"{name}.safetensors")
        network.load_state_dict({key.removeprefix("text_model."): p.float() for key, p in weights.items()})
    ratio = factor / json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
    if abs(ratio - 1) < 1e-3:
        return
    a = np.array(alpha_bar())
    signal = np.log(a / (1 - a))  # falls with t
    t = torch.arange(1000.0, device=model.unet.conv_in.weight.device)
    same = np.interp(-(signal + 2 * math.log(ratio)), -signal, np.arange(1000.0))
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(ratio**-0.5)
        wanted = model.unet.time(torch.tensor(same, dtype=torch.float32).to(t.device))
    parts = list(model.unet.time_embedding.parameters())
    optimizer = torch.optim.Adam(parts, lr=1e-3)
    for step in tqdm(range(3000), "moving timesteps", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / 3000)
        error = F.mse_loss(model.unet.time(t), wanted)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    print(f"timesteps moved, relative error {(error / wanted.var()).sqrt().item():.2g}", flush=True)


def load_denoiser(args: argparse.Namespace) -> Denoiser:
    """The averaged text encoder and UNet of a run, for use; unknown words made neutral."""
    model = Denoiser().to(args.device).eval().requires_grad_(False)
    model.load_state_dict(torch.load(args.work / "unet.pt", map_location=args.device, weights_only=True)["average"])
    _, table = caption_table(training_scenes(args.scenes))
    neutralise(model.text_encoder, table)
    return model


def caption_table(all_scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """(which (n, 2, templates) int64, table (captions, 77) int64): the scenes' captions as rows of a table of ids.
    which[:, 0] names the place, which[:, 1] does not. Row 0 of the table is the empty caption.
    """
    rows = {"": 0}
    which = [
        [[rows.setdefault(s.caption(form, place), len(rows)) for form in scenes.TEMPLATES] for place in (True, False)]
        for s in all_scenes
    ]
    return torch.tensor(which), Tokenizer()(list(rows))


def neutralise(text_encoder: CLIPText, table: Tensor) -> None:
    """Give every token that no training caption has the trained row of UNKNOWN_ID."""
    weight = text_encoder.embeddings.token_embedding.weight
    unseen = torch.ones(len(weight), dtype=torch.bool)
    unseen[table.unique()] = False
    with torch.no_grad():
        weight[unseen.to(weight.device)] = weight[UNKNOWN_ID].clone()


def draw_captions(which: Tensor, table: Tensor, rng: torch.Generator) -> Tensor:
    """which (b, 2, templates) of the batch's scenes -> ids (b, 77): a template each, the place left out or not, an
    unknown word put in somewhere, or nothing said at all. All on the device of the generator.
    """
    b, where = len(which), {"generator": rng, "device": rng.device}
    template = torch.randint(which.shape[2], (b,), **where)
    no_place = (torch.rand(b, **where) < PLACE_DROP).long()
    rows = which[torch.arange(b, device=rng.device), no_place, template]
    ids = table[rows.masked_fill(torch.rand(b, **where) < CAPTION_DROP, 0)]
    ends = (ids == EOS).int().argmax(dim=1)  # the first of them
    at = 1 + (torch.rand(b, **where) * ends).long()[:, None]  # 1 to the end: any place between the words
    places = torch.arange(ids.shape[1], device=rng.device).expand_as(ids)
    longer = ids.gather(1, places - (places > at).long()).scatter(1, at, UNKNOWN_ID)
    return torch.where(torch.rand(b, 1, **where) < UNKNOWN_RATE, longer, ids)


@torch.no_grad()
def cached_latents(args: argparse.Namespace) -> tuple[Tensor, float]:
    """(latents (n, 4, 24, 24) float32 times the scaling factor, the scaling factor) of the training scenes, from a file
    that is made once. The factor makes the deviation of the posterior means LATENT_SCALE.
    """
    path = args.work / "latents.pt"
    if not path.exists():
        data, vae = training_pictures(args), load_vae(args)
        pieces = tqdm(data.split(64), "encoding", disable=None)
        latents = torch.cat([encoded(piece[..., :3], vae, args) for piece in pieces])
        factor = round(LATENT_SCALE / latents.std().item(), 5)
        save_atomic({"latents": latents * factor, "factor": factor}, path)
    saved = torch.load(path, weights_only=True)
    return saved["latents"], saved["factor"]


@torch.no_grad()
def encoded(pictures: np.ndarray | Tensor, vae: VAE, args: argparse.Namespace) -> Tensor:
    """(b, 192, 192, 3) uint8 -> the posterior's means (b, 4, 24, 24) float32, not scaled, on the CPU."""
    with half_precision(args):
        return vae.encode(to_input(pictures, args.device))[0].float().cpu().contiguous()


def drawing_weights() -> Tensor:
    """(1000,): how often each timestep is drawn: as min-SNR weighs its loss (Hang et al., 2303.09556: min(1, 5 / SNR)
    for predicted noise), but nearly clean latents not rarer than a quarter, since an edit begins and ends there. Drawn
    so rather than weighed so: a step on a sample of weight .01 is a step lost.
    """
    a = torch.tensor(alpha_bar())
    return (SNR_LIMIT * (1 - a) / a).clamp(RAREST, 1)


@torch.no_grad()
def judge_loss(model: Denoiser, x0: Tensor, ids: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Squared error of the noise on evaluation scenes, by quarters of the noise range, always on the same noises."""
    rng, a, losses = torch.Generator().manual_seed(0), torch.tensor(alpha_bar()), {}
    for low in range(0, 1000, 250):
        t = torch.randint(low, low + 250, (len(x0),), generator=rng)
        noise = torch.randn(x0.shape, generator=rng)
        at = a[t][:, None, None, None]
        x = (at.sqrt() * x0 + (1 - at).sqrt() * noise).to(args.device)
        with half_precision(args):
            eps = model(x, t.to(args.device), ids.to(args.device))
        losses[f"t{low}"] = F.mse_loss(eps.float().cpu(), noise).item()
    return losses


@torch.no_grad()
def sample(model: Denoiser, prompts: list[str], guidance: float, args: argparse.Namespace, steps: int = 50) -> Tensor:
    """Latents (n, 4, 24, 24), still scaled, by DDIM from the noises of seed 0."""
    ids = Tokenizer()(["", *prompts]).to(args.device)
    text = model.text_encoder(ids)
    n = len(prompts)
    both = torch.cat([text[:1].expand(n, -1, -1), text[1:]])
    t, a = levels(steps)
    side = UNET_CONFIG.sample_size
    x = noises((4, side, side), n, seed=0).to(args.device)
    for j in range(steps, 0, -1):
        with half_precision(args):
            free, told = model.unet(torch.cat([x, x]), t[j], both).float().chunk(2)
        x = move(x, free + guidance * (told - free), a[j], a[j - 1])
    return x


@torch.no_grad()
def judge_unet(model: Denoiser, vae: VAE, factor: float, args: argparse.Namespace) -> None:
    """Saves a contact sheet: every object once, each in some place, and every place; guidance 7.5, then 3."""
    places = list(scenes.PLACES)
    chosen = [Scene(places[i % len(places)], 0, (scenes.Thing(name, 0.5, 0.5, 0.5),))
              for i, name in enumerate(scenes.OBJECTS)] + [Scene(place, 0) for place in places]  # fmt: skip
    rows = []
    for guidance in (7.5, 3.0):
        x = sample(model, [s.caption() for s in chosen], guidance, args)
        rows += np.split(to_pictures(vae.decode(x / factor)), 2)
    save_sheet(rows, args.work / "unet.png")


def train_unet(args: argparse.Namespace) -> None:
    latents, factor = cached_latents(args)
    which, table = caption_table(training_scenes(args.scenes))
    model = Denoiser().to(args.device, memory_format=torch.channels_last)
    if args.start and not (args.work / "unet.pt").exists():  # else the run goes on
        begin_from(args.start, model, factor)
    averaged = Denoiser().to(args.device).eval()
    vae = load_vae(args)
    for name, part in model.named_children():
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters", flush=True)
    print(f"{len(table)} captions of {len(table.unique())} tokens, scaling factor {factor}", flush=True)
    run = Run("unet", model, args.rate, args)
    unseen = evaluation_scenes(256)
    pictures, test_ids = np.stack([s.picture() for s in unseen]), Tokenizer()([s.caption() for s in unseen])
    test = encoded(pictures, vae, args) * factor, test_ids
    denoise = torch.compile(model) if args.compile else model
    latents, which, table = (one.to(args.device) for one in (latents, which, table))
    a, often = torch.tensor(alpha_bar(), device=args.device), drawing_weights().to(args.device)
    total = torch.zeros((), device=args.device)
    for rng in run.steps():
        chosen = torch.randint(len(latents), (args.batch,), generator=rng, device=rng.device)
        ids, x0 = draw_captions(which[chosen], table, rng), latents[chosen]
        t = torch.multinomial(often, args.batch, replacement=True, generator=rng)
        noise = torch.randn(x0.shape, generator=rng, device=rng.device)
        at = a[t][:, None, None, None]
        x = (at.sqrt() * x0 + (1 - at).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with half_precision(args):
            eps = denoise(x, t, ids)
        loss = F.mse_loss(eps.float(), noise)
        run.learn(loss)
        total += loss.detach()
        if run.step % 100 == 0:
            run.log(loss=total.item() / 100)
            total.zero_()
        if run.step % 1000 == 0:
            averaged.load_state_dict(run.average.values)
            run.log(**judge_loss(averaged, *test, args))
        if run.step % 5000 == 1000:
            judge_unet(averaged, vae, factor, args)
    run.save()
    judge_unet(load_denoiser(args), vae, factor, args)


def export_mini(args: argparse.Namespace) -> None:
    _, factor = cached_latents(args)
    model = load_denoiser(args)
    config = replace(VAE_CONFIG, scaling_factor=factor)
    export(load_vae(args), config, model.text_encoder, model.unet, args.output)
    print(f"written to {args.output}")


def add_training(parser: argparse.ArgumentParser, scenes: int) -> None:
    """The options every training shares."""
    parser.add_argument("--work", type=Path, default=HERE / ".train", metavar="DIR", help="checkpoints and logs")
    parser.add_argument("--minutes", type=above_0, default=math.inf, help="budget of training time")
    parser.add_argument("--steps", type=above_0, help="budget of training steps; default: what made weights/mini")
    parser.add_argument("--batch", type=count, help="default: what made weights/mini")
    parser.add_argument("--rate", type=above_0, help="largest learning rate; default: what made weights/mini")
    parser.add_argument("--scenes", type=count, default=scenes, help="number of training scenes (%(default)s)")
    parser.add_argument("--seed", type=count_or_0, default=0)
    parser.add_argument("--threads", type=count, help="CPU threads; torch's choice if not given")
    parser.add_argument("--polite", action="store_true", help="one thread while other programs run (Linux)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def prepare(args: argparse.Namespace, recipe: tuple[float, int, float]) -> None:
    """Budget, batch and rate of the recipe where none is given; the folder, the threads, the seed."""
    steps, batch, rate = recipe
    args.device = choose_device(args.device)
    args.steps = args.steps or (steps if math.isinf(args.minutes) else math.inf)
    args.batch, args.rate = args.batch or batch, args.rate or rate
    args.work.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.train", description=__doc__)
    parser.add_argument("what", choices=["vae", "unet", "export"])
    add_training(parser, scenes=20_000)
    parser.add_argument("--output", type=Path, default=HERE / "mini", metavar="DIR", help="where export writes")
    parser.add_argument("--start", type=Path, metavar="DIR", help="unet: begin from this miniature's weights")
    parser.add_argument("--float32", action="store_true", help="no bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the UNet first, where that pays (a GPU)")
    run_command(parser, train)


def train(args: argparse.Namespace) -> None:
    prepare(args, RECIPE.get(args.what, (0, 0, 0.0)))
    {"vae": train_vae, "unet": train_unet, "export": export_mini}[args.what](args)


if __name__ == "__main__":
    main()
