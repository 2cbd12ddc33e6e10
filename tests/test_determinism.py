"""The same seed gives the same bits in every fresh process; where torch rounds otherwise, how far that goes.

Also through taps and gradients: MasaCtrl and null-text inversion run beside DiffEdit.

Bit for bit on one machine: the same edit again, also under another hash seed; any chunk and batch size with predictors
that round row by row. Not promised bit for bit, and so only bounded here: another number of threads, and on models
another number of rows in one call (`chunk`, the batch size), where torch may sum in another order.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stubs
import torch

import minidiffedit
from minidiffedit import StableDiffusion, edit, encode, find_mask, masked_decode

ROOT = Path(minidiffedit.__file__).parents[1]
BOTH = {"source": "a horse", "target": "a zebra", "seed": 5}
PRINT = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import torch
from test_determinism import digest, everything

torch.set_num_threads(2)
warnings.simplefilter("ignore")
for dtype in ("float32", "bfloat16"):
    torch.manual_seed(hash("a") % 2**31)  # the global generator is another one in every process, and must not matter
    print(digest(everything(sys.argv[2], dtype=dtype)))
"""


@pytest.fixture(scope="module")
def folder(deep_folder):
    return deep_folder


def everything(folder, *, chunk=None, dtype="float32"):
    """What an edit of each kind computes, by name."""
    picture = np.random.default_rng(0).integers(0, 256, (80, 72, 3), dtype=np.uint8)
    sd = StableDiffusion.load(folder, device="cpu", dtype=dtype)
    done = edit(sd, picture, **BOTH, steps=5, maps=5, chunk=chunk, paste=False)
    masa = edit(sd, picture, "masactrl", first_step=0, steps=2, reuse=done, **BOTH)
    null = edit(sd, picture, "null-text+replay", inner_steps=2, steps=2, reuse=done, **BOTH)
    kept = {"maps": done.found.maps, "x0": done.x0, "latent": done.latent, "mask": done.latent_mask}
    kept |= {"masactrl": masa.latent, "null-text": null.latent, "image": torch.from_numpy(np.array(done.image))}
    return kept | {f"level {i}": one for i, one in enumerate((*done.trajectory.values(), *done.decoded))}


def digest(kept):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in kept.values())).hexdigest()


@pytest.mark.slow
def test_the_same_edit_again_in_a_fresh_process(folder):
    """Everything computed, down to the last bit, also under another hash seed and another global generator."""
    found = []
    for hashes in ("1", "2"):
        command = [sys.executable, "-c", PRINT, str(Path(__file__).parent), str(folder)]
        environment = {**os.environ, "PYTHONHASHSEED": hashes, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found[0] == found[1] and len({*found[0]}) == 2  # one for each dtype


def test_other_threads_and_chunks_round_otherwise_at_most(folder):
    """The bound of float32: 1e-5, relative; the mask may differ only where the heat is that close to its threshold."""
    plain, before = everything(folder), torch.get_num_threads()
    runs = {"chunk 1": everything(folder, chunk=1), "chunk 2": everything(folder, chunk=2)}
    try:
        torch.set_num_threads(2)
        runs["threads"] = everything(folder)
    finally:
        torch.set_num_threads(before)
    heat = plain["maps"].mean(dim=1)
    heat = heat.clamp(max=3 * heat.mean())
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    close = (heat - 0.5).abs() < 1e-4
    for name, other in runs.items():
        for value in ("maps", "x0"):
            error = (other[value] - plain[value]).abs().max() / plain[value].abs().max()
            assert error <= 1e-5, (name, value, error)
        assert (other["mask"][:, 0] == plain["mask"][:, 0])[~close].all(), name
        if torch.equal(other["mask"], plain["mask"]):
            error = (other["latent"] - plain["latent"]).abs().max() / plain["latent"].abs().max()
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
