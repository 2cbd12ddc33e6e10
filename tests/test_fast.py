"""The fast paths: the same numbers as the plain one, taken where they were asked for, refused where they cannot be."""

import gc
import os
import pickle
import re
import sys
import warnings
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import tiny
import torch
from mutants import mutant
from PIL import Image
from stubs import latent
from torch.utils.flop_counter import FlopCounterMode

from minidiffedit import StableDiffusion, edit, fast, kernels, load_state, save_state
from minidiffedit.attention import Hooks, Site
from minidiffedit.checkpoint import build
from minidiffedit.cli import main
from minidiffedit.files.configs import KINDS
from minidiffedit.unet import Attention, UNet, fan_out
from minidiffedit.vae import VAE, VAEConfig


def error(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def small_unet(config=tiny.SHALLOW):
    torch.manual_seed(0)
    return UNet(config).eval().requires_grad_(False)


ONE_LEVEL = replace(tiny.SHALLOW, block_out_channels=(16,))


def picture(side=64):
    return Image.fromarray((latent(side, side, 3, seed=5).clamp(-1, 1) * 127 + 128).byte().numpy())


# ---------------------------------------------------------------- the schedule


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_flop_counts()


@pytest.mark.slow
def test_counts_at_full_size():
    """What the exact savings are worth, in FLOP of a 512 x 512 UNet row: shapes alone, no weights."""
    with torch.device("meta"):
        unet, x, t, text = UNet(), torch.empty(1, 4, 64, 64), torch.ones(1), torch.empty(2, 77, 768)
    with torch.no_grad():
        row = sum(flops(lambda: unet(x, t, text[:1]))["UNet"].values())
        counts = flops(lambda: unet(x, t, text))
    assert row == pytest.approx(803.3e9, rel=1e-3)
    shared = 2 * row - sum(counts["UNet"].values())
    assert shared / row == pytest.approx(0.051, abs=5e-4)  # what lies before the first cross-attention
    # Saved after the first call (kernels/once.py), for its launches on a GPU; on a CPU it is next to nothing.
    part = {name: sum(ops.values()) for name, ops in counts.items()}
    of_text = sum(n for name, n in part.items() if name.endswith(("attn2.to_k", "attn2.to_v")))
    of_time = sum(n for name, n in part.items() if name.endswith(("time_emb_proj", "time_embedding")))
    assert of_text > 0 < of_time and of_text / 2 / row < 0.004 and of_time / row < 0.0001


# ---------------------------------------------------------------- compiling


@torch.no_grad()
@pytest.mark.parametrize("kind, context_width", [("self", 16), ("cross", 24)])
def test_joined_products_are_the_same(kind, context_width):
    torch.manual_seed(0)
    plain = Attention(16, context_width, 2, Site("down", 0, 0, kind))
    x = latent(2, 9, 16, dtype=torch.float32)
    context = x if kind == "self" else latent(2, 7, 24, seed=1, dtype=torch.float32)
    assert error(fast.FusedAttention(plain)(x, context, Hooks()), plain(x, context, Hooks())) <= 1e-6


def test_every_attention_is_joined():
    unet = fast.fuse(small_unet())
    kinds = {type(module) for module in unet.modules()}
    assert fast.FusedAttention in kinds and Attention not in kinds


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def fresh_compiler(monkeypatch, compiled):
    """In a folder of this run, where what every graph includes is compiled once: a killed run leaves broken files."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_one_graph_per_shape_and_none_within_or_between_edits(fresh_compiler):
    """Three shapes: masks, encoding, guided steps. `eager` captures and guards as inductor does, quickly."""
    sd = tiny.model()
    sd.unet = small_unet(ONE_LEVEL)
    plain = edit(sd, picture(), target="a", source="b", steps=3, maps=2, seed=1)
    said = []
    sd.unet = fast.CompiledUNet(sd.unet, backend="eager", note=said.append)
    done = edit(sd, picture(), target="a", source="b", steps=3, maps=2, seed=1)
    assert graphs() == len(sd.unet.seconds) == 3 and set(sd.unet.seconds) == {(2, 4, 8, 8), (1, 1, 8, 8), (1, 2, 8, 8)}
    assert error(done.latent, plain.latent) <= 1e-4
    assert len(said) == 6 and "1 x 2 texts of 8 x 8 cells: once" in said[4]
    assert re.fullmatch(
        r".*: [\d.]+ s; then a call takes .* s, before .*: it pays (never here|after \d+ edits)", said[5]
    )
    with torch.compiler.set_stance("fail_on_recompile"):
        edit(sd, picture(), target="c", source="d", negative_prompt="e", steps=5, strength=0.6, maps=2, seed=2)
    assert graphs() == 3 and len(said) == 6
    sd.eps(latent(1, 4, 16, 16, dtype=torch.float32), 1, [sd.text(["a"])])
    assert graphs() == 4  # another size is another shape


@pytest.mark.slow
def test_pictures_of_about_one_shape_share_what_is_compiled(fresh_compiler, folder, tmp_path):
    """Sides go to multiples of 64 pixels, which is said; the result has its picture's own size, and can be resumed."""
    sd = StableDiffusion.load(folder, device="cpu")
    sd.unet = fast.CompiledUNet(small_unet(ONE_LEVEL), backend="eager")
    few = {"target": "a", "source": "b", "steps": 2, "maps": 1, "seed": 1}
    for width in (100, 116, 140):  # 104, 120 and 144 at steps of 8
        with pytest.warns(UserWarning, match="works at 128 x 64 in place of .* x 64: compiled once"):
            done = edit(sd, picture().resize((width, 64)), **few)
        assert done.image.size == (width, 64) and done.settings["working_size"] == (128, 64)
    assert graphs() == 2 and len(sd.unet.seconds) == 2  # a map is asked under two texts, as a guided step is
    save_state(done, tmp_path / "s.safetensors")
    assert load_state(tmp_path / "s.safetensors", sd).settings["working_size"] == (128, 64)
    plain = tiny.model()
    assert edit(plain, picture().resize((100, 64)), **few).settings["working_size"] == (104, 64)


def test_when_compiling_pays(monkeypatch):
    """By a clock of the test's own: 3 s a plain call, 1 s a compiled one, 100 s of compiling: after 1 edit."""
    now, said, called = [0.0], [], []
    unet = fast.CompiledUNet(small_unet(ONE_LEVEL), note=said.append)

    def plain(x, *_):
        now[0] += 3
        called.append("plain")
        return x

    def replay(x, *_):
        now[0] += 1 if "replay" in called else 100  # the first compiles
        called.append("replay")
        return x

    monkeypatch.setattr(unet, "unet", plain)
    monkeypatch.setattr(unet, "replay", replay)
    monkeypatch.setattr(fast.time, "perf_counter", lambda: now[0])
    x = latent(1, 4, 8, 8, dtype=torch.float32)
    for t in (1, 481):
        unet(x, t, latent(2, 77, 24, dtype=torch.float32))
    assert called == ["plain"] * 3 + ["replay"] * 5 and len(said) == 2
    assert said[1].endswith("8 x 8 cells: 100.0 s; then a call takes 1 s, before 3: it pays after 1 edits")


def test_a_model_on_a_gpu_makes_it_the_current_one(monkeypatch, folder, loads):
    """Triton launches on the current device; torchrun's second process is given cuda:1 and no more."""
    made = []
    module = sys.modules[StableDiffusion.__module__]
    monkeypatch.setattr(module, "choose_device", lambda device: torch.device(device))
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(module, "find_model", mock.Mock(side_effect=ValueError("no weights are wanted here")))
    for device in ("cuda:1", "cpu"):
        with pytest.raises(ValueError, match="no weights"):
            loads(folder, device=device)
    assert made == [torch.device("cuda:1")]


@torch.no_grad()
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_decoder_that_overflows_float16_decodes_in_bfloat16(folder, low_memory, loads):
    sd, wide = (loads(folder, device="cpu", dtype=dtype) for dtype in ("float16", "bfloat16"))
    sd.low_memory = wide.low_memory = low_memory
    z = latent(1, 4, 8, 8, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sd.decode(z).isfinite().all()
    for one in (sd, wide):
        one.vae.decoder.conv_norm_out.weight.mul_(2.0**8)
        one.vae.decoder.conv_out.weight.mul_(2.0**10)
    kept = {name: p.clone() for name, p in sd.vae.named_parameters()}
    with pytest.warns(UserWarning, match="decoded again in bfloat16"):
        picture = sd.decode(z)
    assert picture.abs().max() > 65504 and error(picture, wide.decode(z)) <= 2e-2
    assert all(torch.equal(p, kept[name]) and p.dtype == torch.float16 for name, p in sd.vae.named_parameters())


@pytest.mark.slow
@pytest.mark.long
def test_more_sizes_than_torchs_own_limit(fresh_compiler):
    unet, text = fast.CompiledUNet(small_unet(ONE_LEVEL), backend="eager"), latent(1, 77, 24, dtype=torch.float32)
    for side in range(2, 12):
        unet(latent(1, 4, side, side, dtype=torch.float32), 1, text)
    assert graphs() == 10


@pytest.mark.slow
@pytest.mark.parametrize("config, dtype, bound", [
    (ONE_LEVEL, torch.float32, 1e-5),
    pytest.param(tiny.SHALLOW, torch.float32, 1e-5, marks=pytest.mark.long),
    pytest.param(ONE_LEVEL, torch.bfloat16, 2e-2, marks=pytest.mark.long),
])  # fmt: skip
def test_compiled_numbers(fresh_compiler, config, dtype, bound):
    """Really by inductor: its generated code ran, and the numbers are the plain ones."""
    plain, compiled = small_unet(config).to(dtype), fast.CompiledUNet(small_unet(config).to(dtype))
    x, text = latent(1, 4, 8, 8).to(dtype), latent(2, 77, 24, seed=1).to(dtype)
    for t in (1, 481, 981):
        assert error(compiled(x, t, text), plain(x, t, text)) <= bound
    counters = torch._dynamo.utils.counters
    assert graphs() == 1 and sum(counters["graph_break"].values()) == 0
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] == 1
    assert compiled.seconds.keys() == {(1, 2, 8, 8)}


def vae_of_one_level():
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=2)
    return VAE(config).eval().requires_grad_(False)


@pytest.mark.slow
def test_both_halves_of_the_vae_once_per_shape(fresh_compiler, sd):
    """`eager` captures and guards as inductor does, quickly."""
    sd = StableDiffusion(sd.unet, vae_of_one_level(), sd.clip, sd.tokenizer)
    z, image = latent(1, 4, 4, 4, dtype=torch.float32), latent(1, 3, 32, 32, dtype=torch.float32).clamp(-1, 1)
    with torch.no_grad():
        plain = sd.decode(z), sd.encode(image)
        sd.vae = fast.compiled_vae(sd.vae, backend="eager")
        for _ in range(2):
            assert error(sd.decode(z), plain[0]) <= 1e-5 and error(sd.encode(image), plain[1]) <= 1e-5
        assert graphs() == 2
        sd.decode(torch.cat([z, z]))
        assert graphs() == 3


@pytest.mark.long
def test_compiled_numbers_of_the_vae(fresh_compiler):
    """Really by inductor."""
    plain, compiled = vae_of_one_level(), fast.compiled_vae(vae_of_one_level())
    with torch.no_grad():
        for seed in (1, 2):
            z, image = (latent(1, c, 8, 8, seed=seed, dtype=torch.float32) for c in (4, 3))
            assert error(compiled.decode(z), plain.decode(z)) <= 1e-5
            assert all(error(ours, theirs) <= 1e-5 for ours, theirs in zip(compiled.encode(image), plain.encode(image)))
    assert graphs() == 2 and sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


def test_what_cannot_be_compiled_is_refused(monkeypatch, folder):
    unet = fast.CompiledUNet(small_unet(), backend="eager")
    x, text = latent(1, 4, 8, 8, dtype=torch.float32), latent(1, 77, 24, dtype=torch.float32)
    advice = "no tap, no feature and the built-in attention only; load the model without compile"
    with pytest.raises(ValueError, match=advice):
        unet(x, 1, text, lambda site, q, k, v: q)
    sd = tiny.model()
    sd.unet = unet
    for hook in ({"tap": lambda plain, *of: plain(*of)}, {"feature": lambda site, h: h}):
        with pytest.raises(ValueError, match=advice):
            sd.eps(x, 1, [text], **hook)
    with pytest.raises(ValueError, match="no gradient"):
        unet(x.requires_grad_(), 1, text)
    with pytest.raises(ValueError, match="exclude each other"):
        StableDiffusion.load(folder, device="cpu", compile=True, low_memory=True)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler \(g\+\+\)"):
        StableDiffusion.load(folder, device="cpu", compile=True)
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(ValueError, match="needs 'my-compiler'"):
        StableDiffusion.load(folder, device="cpu", compile=True)
    with pytest.raises(ValueError, match="attention must be one of auto, sdpa, triton, got 'flash'"):
        StableDiffusion.load(folder, device="cpu", attention="flash")


def test_a_failing_compiler_is_said_in_one_line(fresh_compiler):
    def broken(graph, inputs):
        raise RuntimeError("no space\nleft")

    unet = fast.CompiledUNet(small_unet(), backend=broken)
    with pytest.raises(
        RuntimeError, match=r"^compiling the UNet for 1 x 1 texts of 8 x 8 cells failed: .*without compile"
    ):
        unet(latent(1, 4, 8, 8, dtype=torch.float32), 1, latent(1, 77, 24, dtype=torch.float32))
    assert not unet.seconds


def test_load_compiles_when_asked(folder):
    assert type(StableDiffusion.load(folder, device="cpu").unet) is UNet
    sd = StableDiffusion.load(folder, device="cpu", compile=True)
    assert type(sd.unet) is fast.CompiledUNet and sd.unet.config == tiny.QUICK and sd.side == 64


class StandIn:
    """For kernels.openvino.Converted, where the package openvino may be missing: what it was given."""

    def __init__(self, network, function, folder):
        self.network, self.asked = network, (function.__name__, folder)


def test_openvino_takes_the_networks_as_they_are(monkeypatch, folder):
    """Its numbers are checked in test_openvino.py, where it is installed."""
    monkeypatch.setattr(kernels.openvino, "lacking", lambda device, dtype: None)
    monkeypatch.setattr(kernels.openvino, "Converted", StandIn)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "kept")
    sd = StableDiffusion.load(folder, device="cpu", compile="openvino")
    asked = [sd.unet.graph, sd.vae.encode, sd.vae.decode]
    assert [one.asked for one in asked] == [("of_time", "kept"), ("encode", "kept"), ("decode", "kept")]
    assert asked[0].network is sd.unet.unet and asked[1].network is asked[2].network is sd.vae
    kinds = {type(module) for module in sd.unet.unet.modules()}
    assert type(sd.unet) is fast.CompiledUNet and Attention in kinds and fast.FusedAttention not in kinds
    x, text = latent(1, 4, 8, 8, dtype=torch.float32), latent(1, 77, 24, dtype=torch.float32)
    for hook in ({"tap": lambda plain, *of: plain(*of)}, {"feature": lambda site, h: h}):
        with pytest.raises(ValueError, match="load the model without compile"):
            sd.eps(x, 1, [text], **hook)
    with pytest.raises(ValueError, match="without compile and low_memory"):
        sd.eps(x, 1, [text], deltas={"conv_in.weight": torch.zeros(())})


def test_where_openvino_cannot_run_is_said(monkeypatch, folder, tmp_path, capsys):
    monkeypatch.setattr(kernels.openvino, "find_spec", lambda name: None)
    for options, said in [
        ({"dtype": "float16"}, "compile needs float32 or bfloat16 for OpenVINO, got float16"),
        ({}, r"compile needs the package openvino \(pip install"),
        ({"low_memory": True}, "exclude each other"),
        ({"compile": "tvm"}, "compile must be False, True, 'torch' or 'openvino', got 'tvm'"),
    ]:
        with pytest.raises(ValueError, match=said):
            StableDiffusion.load(folder, **{"device": "cpu", "compile": "openvino"} | options)
    assert kernels.openvino.lacking(torch.device("cuda:1"), torch.float32) == "the CPU for OpenVINO, got cuda:1"
    command = ["generate", "a", "--model", str(folder), "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert main([*command, "--compile", "openvino"]) == 1 and "package openvino" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["edit", "--compile", "photo.png", "--target", "a"])
    assert "torch or openvino is wanted, got 'photo.png'; a picture goes before" in capsys.readouterr().err


def test_what_was_used_longest_ago_makes_room(monkeypatch, tmp_path):
    for age, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "network.bin").write_bytes(bytes(10))
        os.utime(tmp_path / name, (100 - age, 100 - age))  # c is the oldest
    monkeypatch.setattr(kernels.openvino, "MOST", 35)
    kernels.openvino.make_room(tmp_path, 5)
    assert len([*tmp_path.iterdir()]) == 3
    kernels.openvino.make_room(tmp_path, 6)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    with pytest.raises(OSError, match=r"1000000\.0 GB and a GiB to spare are wanted in"):
        kernels.openvino.make_room(tmp_path, 10**15)


# ---------------------------------------------------------------- memory


def vaes():
    vae = tiny.networks()[1]
    deeper = VAE(VAEConfig(block_out_channels=(8, 16), norm_num_groups=2)).eval().requires_grad_(False)
    return [(vae, (8, 8)), (vae, (5, 9)), (vae, (1, 1)), (deeper, (13, 3))]


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 6, 16, 64])
def test_strips_give_the_same_picture(rows):
    for vae, size in vaes():
        z = latent(2, 4, *size, dtype=torch.float32) * 3 + 1
        assert error(fast.decode_by_rows(vae, z, rows), vae.decode(z)) <= 1e-5


@torch.no_grad()
def test_strips_keep_a_norms_numbers_where_the_mean_is_large():
    norm = torch.nn.GroupNorm(2, 8, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = 1000 + latent(1, 8, 33, 5, dtype=torch.float32)
    scale, shift = fast.scale_and_shift(norm, x, 4)
    assert error(scale * x.double() + shift, norm.double()(x.double())) <= 1e-3


@torch.no_grad()
def test_strips_are_used_for_large_pictures_and_low_memory(monkeypatch, sd):
    used = []
    monkeypatch.setattr(fast, "decode_by_rows", lambda vae, z: used.append(z.shape) or vae.decode(z))
    sd.decode(latent(1, 4, 8, 8))
    assert not used
    sd.decode(latent(1, 4, 97, 96))
    assert used == [(1, 4, 97, 96)]
    monkeypatch.setattr(sd, "low_memory", True)
    sd.decode(latent(1, 4, 8, 8))
    assert len(used) == 2
    monkeypatch.setattr(sd, "low_memory", False)
    monkeypatch.setattr(fast, "decode", lambda vae, z, by_rows: used.append(by_rows) or z)
    for size in ((96, 96), (97, 95), (96, 97)):
        sd.decode(torch.zeros(1, 4, *size))
    assert used[2:] == [False, False, True]  # beyond 768 x 768 pixels


@torch.no_grad()
def test_strips_bound_what_is_alive():
    """The largest tensors alive at once, in pictures of the widest full-size stage: two and a strip, not three."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Alive(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.sizes, self.peak = {}, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            for one in filter(torch.is_tensor, out if isinstance(out, tuple | list) else [out]):
                storage = one.untyped_storage()
                if storage.data_ptr() not in self.sizes:  # else a view, or written in place
                    self.sizes[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage.data_ptr(), None)
            self.peak = max(self.peak, sum(self.sizes.values()))
            return out

    vae, z = tiny.networks()[1].to(memory_format=torch.channels_last), latent(1, 4, 32, 32, dtype=torch.float32)
    peaks = []
    for decode in (lambda: vae.decode(z), lambda: fast.decode_by_rows(vae, z, 16)):
        gc.collect()
        with Alive() as alive:
            decode()
        peaks.append(alive.peak)
    assert peaks[1] < 0.85 * peaks[0], peaks


def test_low_memory_holds_one_network_at_a_time(folder, monkeypatch):
    plain = StableDiffusion.load(folder, device="cpu")
    expected = edit(plain, picture(), target="a", source="b", steps=3, maps=2, seed=1)
    alive, most, order = weakref.WeakSet(), [], []
    real = fast.OneAtATime.network

    def network(self):
        before = self.shelf[1] if self.shelf else None
        found = real(self)
        if found is not before:
            order.append(type(found).__name__)
            alive.add(found)
            del before
            gc.collect()
            most.append(len(alive))
        return found

    monkeypatch.setattr(fast.OneAtATime, "network", network)
    sd = StableDiffusion.load(folder, device="cpu", low_memory=True)
    order.clear()
    done = edit(sd, picture(), target="a", source="b", steps=3, maps=2, seed=1)
    assert max(most) == 1 and order == ["CLIPText", "VAE", "UNet", "VAE"]
    assert error(done.latent, expected.latent) <= 1e-6 and torch.equal(done.latent_mask, expected.latent_mask)
    assert sd.evaluations == plain.evaluations


def test_a_low_memory_model_can_be_sent_to_another_process(folder):
    sd = pickle.loads(pickle.dumps(StableDiffusion.load(folder, device="cpu", low_memory=True)))
    assert sd.text(["a"]).shape == (1, 77, 24) and sd.unet.config == tiny.QUICK


def test_low_memory_says_at_once_what_is_wrong_with_a_file(tmp_path):
    folder = tiny.write_folder(tmp_path / "m")
    file = folder / "vae" / tiny.FILES["vae"]
    data = bytearray(file.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN
    file.write_bytes(data)
    with pytest.raises(ValueError, match="NaN"):
        StableDiffusion.load(folder, device="cpu", low_memory=True)


# ---------------------------------------------------------------- the CPU


def test_weights_lie_as_cpus_convolve_fastest(folder):
    sd = StableDiffusion.load(folder, device="cpu")
    convolutions = [m for net in (sd.unet, sd.vae) for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convolutions and all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    picture = sd.vae.decode(torch.zeros(1, 4, 3, 3))
    assert picture.is_contiguous(memory_format=torch.channels_last)


def test_rows_that_are_repeated_keep_their_layout():
    """Else the first cross-attention of a shared prefix hands contiguous rows on, and what it saves is lost."""
    x = latent(2, 4, 6, 5).to(memory_format=torch.channels_last)
    rows = fan_out(x, 6)
    assert rows.is_contiguous(memory_format=torch.channels_last) and torch.equal(rows, x.repeat(3, 1, 1, 1))


@pytest.mark.parametrize("able, parameters, dtype", [
    (True, 1_066_235_307, torch.bfloat16), (False, 1_066_235_307, torch.float32), (True, 18_000_000, torch.float32),
])  # fmt: skip
def test_auto_dtype_on_a_cpu(monkeypatch, able, parameters, dtype):
    monkeypatch.setattr(fast, "multiplies_bfloat16", lambda: able)
    assert fast.choose_dtype("auto", torch.device("cpu"), parameters) == dtype
    assert fast.choose_dtype("auto", torch.device("cuda"), parameters) == torch.float16
    assert fast.choose_dtype("auto", torch.device("mps"), parameters) == torch.float32
    assert fast.choose_dtype("float32", torch.device("cpu"), parameters) == torch.float32


def test_full_size_counts_as_large_and_the_tiny_one_does_not(monkeypatch, folder, loads):
    count = sum(p.numel() for network in fast_networks() for p in network.parameters())
    assert count == 1_066_235_307 >= fast.LARGE
    monkeypatch.setattr(fast, "multiplies_bfloat16", lambda: True)
    assert StableDiffusion.load(folder, device="cpu").dtype == torch.float32
    monkeypatch.setattr(fast, "LARGE", 1000)
    assert loads(folder, device="cpu").dtype == torch.bfloat16


def fast_networks():
    return [build(network, KINDS[network]()) for network in tiny.FILES]


@pytest.mark.parametrize("flags, able", [
    ("fpu avx512_bf16 amx_bf16 amx_tile", True), ("fpu amx_bf16", True), ("fpu avx512_bf16", True),
    ("fpu avx512f amx_tile", False), ("fp asimd bf16", False), ("fpu avx512f avx512_vbmi", False),
])  # fmt: skip
def test_the_processors_flags(tmp_path, monkeypatch, flags, able):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags} end\n")
    monkeypatch.setattr(fast, "CPUINFO", tmp_path / "cpuinfo")
    assert fast.multiplies_bfloat16() == able
    monkeypatch.setattr(fast, "CPUINFO", tmp_path / "none")
    assert not fast.multiplies_bfloat16()


# ---------------------------------------------------------------- the commands


@pytest.mark.slow
def test_the_commands_compile_and_say_so(fresh_compiler, monkeypatch, folder, tmp_path, capsys):
    for name in ("CompiledUNet", "compiled_vae"):
        made = getattr(fast, name)
        monkeypatch.setattr(fast, name, lambda network, backend, made=made: made(network, "eager"))
    command = ["generate", "a", "--model", str(folder), "--device", "cpu", "--steps", "2", "--compile", "-o"]
    assert main([*command, str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().err
    assert "compiling the UNet for 1 x 2 texts of 8 x 8 cells: once" in said and graphs() == 2  # and the VAE's decoder
    assert main([*command, str(tmp_path / "b.png"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_the_commands_take_low_memory_or_compile_and_name_the_kernel(folder, tmp_path, capsys):
    output = str(tmp_path / "a.png")
    command = ["generate", "a", "--model", str(folder), "--device", "cpu", "--steps", "1", "-o", output]
    assert main([*command, "--low-memory", "--attention", "sdpa"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--low-memory", "--compile"])
    capsys.readouterr()
    assert main([*command, "--attention", "triton"]) == 1
    assert "attention 'triton' cannot run" in capsys.readouterr().err


# ---------------------------------------------------------------- mistakes, made on purpose

MISTAKES = {
    "strips without neighbours": (
        "low, high = max(top - 1, 0), min(end + 1, h)", "low, high = top, end", "test_strips_give_the_same_picture",
    ),
    "each strip normed for itself": (
        "square + (mean - centre[:, None, None]) ** 2", "square", "test_strips_give_the_same_picture",
    ),
    "strips of unequal height weigh the same": (
        "centre = (mean * share).sum(-1).mean(1)", "centre = mean.mean(-1).mean(1)",
        "test_strips_give_the_same_picture",
    ),
    "keys for values": (
        "parts = [plain.to_k.weight, plain.to_v.weight]", "parts = [plain.to_v.weight, plain.to_k.weight]",
        "test_joined_products_are_the_same",
    ),
    "bfloat16 for every model": (
        'large = device.type == "cpu" and parameters >= LARGE and', 'large = device.type == "cpu" and',
        "test_auto_dtype_on_a_cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_turns_a_test_red(name, monkeypatch):
    old, new, test = MISTAKES[name]
    cases = {
        "test_strips_give_the_same_picture": [(6,)],
        "test_joined_products_are_the_same": [("self", 16), ("cross", 24)],
        "test_auto_dtype_on_a_cpu": [(monkeypatch, True, 18_000_000, torch.float32)],
    }[test]
    for case in cases:
        globals()[test](*case)
    monkeypatch.setitem(globals(), "fast", mutant("fast", old, new, monkeypatch))
    with pytest.raises(AssertionError):
        for case in cases:
            globals()[test](*case)
