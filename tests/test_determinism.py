"""The same seed gives the same bits in every fresh process; where torch rounds otherwise, how far that goes.

Also through taps and gradients: MasaCtrl and null-text inversion run beside DiffEdit.

Bit for bit on one machine: the same edit again, also under another hash seed; any chunk and batch size with predictors
that round row by row. Not promised bit for bit, and so only bounded here: another number of threads, and on models
another number of rows in one call (`chunk`, the batch size), where torch may sum in another order.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stubs
import torch

import minidiffedit
from minidiffedit import encode, find_mask, masked_decode

ROOT = Path(minidiffedit.__file__).parents[1]

PRINT = """
import hashlib, json, sys, warnings
import numpy, torch
import minidiffedit

model, threads, chunk, dtype, save = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(hash("a") % 2**31)  # the global generator is another one in every process, and must not matter
warnings.simplefilter("ignore")
picture = numpy.random.default_rng(0).integers(0, 256, (80, 72, 3), dtype=numpy.uint8)
sd = minidiffedit.StableDiffusion.load(model, device="cpu", dtype=dtype)
done = minidiffedit.edit(
    sd, picture, source="a horse", target="a zebra", seed=5, steps=5, maps=5, chunk=int(chunk) or None, paste=False
)
small = {"target": "a zebra", "source": "a horse", "seed": 5, "steps": 2, "reuse": done}
masa = minidiffedit.edit(sd, picture, "masactrl", first_step=0, **small)
null = minidiffedit.edit(sd, picture, "null-text+replay", inner_steps=2, **small)
kept = {"maps": done.found.maps, "x0": done.x0, "latent": done.latent, "mask": done.latent_mask}
kept |= {"masactrl": masa.latent, "null-text": null.latent}
if save != "-":
    numpy.savez(save, **{name: value.numpy() for name, value in kept.items()})
digest = hashlib.sha256(done.image.tobytes())
for value in (*kept.values(), *done.trajectory.values(), *done.decoded):
    digest.update(value.numpy().tobytes())
print(digest.hexdigest(), torch.get_num_threads())
"""


def fresh(folder, *, threads=1, chunk=0, dtype="float32", hashes="random", save="-"):
    """An edit in a process of its own -> the digest of everything it computed."""
    command = [sys.executable, "-c", PRINT, folder, threads, chunk, dtype, save]
    environment = {**os.environ, "PYTHONHASHSEED": hashes, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    digest, used = done.stdout.split()
    assert int(used) == threads
    return digest


@pytest.mark.slow
@pytest.mark.parametrize("threads, dtype", [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_the_same_edit_again_in_a_fresh_process(folder, threads, dtype):
    """Everything computed, down to the last bit, also under another hash seed and another global generator."""
    once, again = (fresh(folder, threads=threads, dtype=dtype, hashes=hashes) for hashes in ("1", "2"))
    assert once == again


@pytest.mark.slow
def test_other_threads_and_chunks_round_otherwise_at_most(folder, tmp_path):
    """The bound of float32: 1e-5, relative; the mask may differ only where the heat is that close to its threshold."""
    runs = {}
    for name, options in (
        ("plain", {}),
        ("threads", {"threads": 2}),
        ("chunk 1", {"chunk": 1}),
        ("chunk 2", {"chunk": 2}),
    ):
        path = tmp_path / f"{name}.npz"
        fresh(folder, save=path, **options)
        runs[name] = np.load(path)
    plain = runs.pop("plain")
    heat = torch.from_numpy(plain["maps"]).mean(dim=1)
    heat = heat.clamp(max=3 * heat.mean())
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    close = ((heat - 0.5).abs() < 1e-4).numpy()
    for name, other in runs.items():
        for value in ("maps", "x0"):
            error = np.abs(other[value] - plain[value]).max() / np.abs(plain[value]).max()
            assert error <= 1e-5, (name, value, error)
        assert (other["mask"][:, 0] == plain["mask"][:, 0])[~close].all(), name
        if (other["mask"] == plain["mask"]).all():
            error = np.abs(other["latent"] - plain["latent"]).max() / np.abs(plain["latent"]).max()
            assert error <= 1e-4, (name, error)


# ---------------------------------------------------------------- row by row, chunks and batches change no bit


X0 = stubs.latent(3, 4, 8, 8, dtype=torch.float32)
TEXTS = {"target": 0.8, "reference": torch.linspace(-1, 1, 8)}


def test_chunks_change_no_bit():
    one = X0[:1]
    masks = [find_mask(stubs.gaussian, one, **TEXTS, maps=7, seed=3, chunk=chunk) for chunk in (None, 1, 2, 3, 7, 99)]
    assert all(torch.equal(mask.maps, masks[0].maps) and torch.equal(mask.mask, masks[0].mask) for mask in masks)


def test_batches_change_no_bit():
    """Image i of a batch is the single run with seed + i, from the mask to the last level of the decoding."""
    together = find_mask(stubs.gaussian, X0, **TEXTS, maps=5, seed=3)
    levels = encode(stubs.gaussian, X0, 0.0, steps=10)
    decoded = masked_decode(stubs.gaussian, levels, together.mask, 0.8, 0.0)
    for i in range(len(X0)):
        one = X0[i : i + 1]
        mask = find_mask(stubs.gaussian, one, **TEXTS, maps=5, seed=3 + i)
        assert torch.equal(mask.maps[0], together.maps[i]) and torch.equal(mask.mask[0], together.mask[i])
        alone = encode(stubs.gaussian, one, 0.0, steps=10)
        assert all(torch.equal(alone[j][0], levels[j][i]) for j in levels)
        assert torch.equal(masked_decode(stubs.gaussian, alone, mask.mask, 0.8, 0.0)[0], decoded[i])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit_of_the_noise_and_the_loops(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        levels = encode(stubs.gaussian, X0, 0.0, steps=10)
        noises = minidiffedit.noises((4, 64, 64), 2, 7)
    finally:
        torch.set_num_threads(before)
    again = encode(stubs.gaussian, X0, 0.0, steps=10)
    assert all(torch.equal(levels[j], again[j]) for j in levels)
    assert torch.equal(noises, minidiffedit.noises((4, 64, 64), 2, 7))
