"""`compile="openvino"` where the package is (`make test-openvino`): its numbers, what is kept between runs."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from stubs import latent

from minidiffedit import StableDiffusion, edit
from minidiffedit.fast import CompiledUNet, compiled_vae
from minidiffedit.kernels import openvino as ours
from minidiffedit.kernels.openvino import Converted
from minidiffedit.unet import UNet

openvino = pytest.importorskip("openvino")
BFLOAT16 = 2  # times torch's error, to float64
GIVEN = latent(1, 4, 8, 8, dtype=torch.float32), torch.tensor([481]), latent(2, 77, 24, seed=1, dtype=torch.float32)


def error(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def unet(dtype=torch.float32, config=tiny.SHALLOW):
    return tiny.networks(unet=config)[0].to(dtype)


def given(dtype):
    return [one.to(dtype) if one.is_floating_point() else one for one in GIVEN]


def converter(network, folder=None):
    return Converted(network, network.forward, folder)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def converted(monkeypatch):
    """The shapes that were converted, not taken from the folder."""
    made, convert = [], Converted.convert
    monkeypatch.setattr(Converted, "convert", lambda self, given: made.append(given) or convert(self, given))
    return made


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers(tmp_path, monkeypatch, dtype, keep):
    """Against float64: float32 to 1e-4; bfloat16, in which OpenVINO norms too, to BFLOAT16 of torch's error."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if keep:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network, plain, exact = unet(dtype), unet(dtype), unet(torch.float64)
    before = {name: one.clone() for name, one in network.state_dict().items()}
    compiled, (x, _, text) = CompiledUNet(network, "openvino"), given(dtype)
    for t in (1, 481, 999):
        made, torchs = compiled(x, t, text), plain(x, t, text)
        want = exact(x.double(), t, text.double())
        assert made.dtype == dtype and made.shape == want.shape
        assert error(made, want) <= (1e-4 if dtype == torch.float32 else BFLOAT16 * error(torchs, want))
    assert bool([*tmp_path.iterdir()]) == keep
    after = network.state_dict()
    assert all(torch.equal(one, after[name]) and after[name].dtype == dtype for name, one in before.items())


def test_a_second_process_converts_nothing(tmp_path):
    first = converter(unet(), tmp_path)(*GIVEN)
    torch.save(first, tmp_path / "first.pt")
    code = (
        "import sys, torch, test_openvino as t; from minidiffedit.kernels.openvino import Converted\n"
        "Converted.convert = None\n"
        "with torch.no_grad(): made = t.converter(t.unet(), sys.argv[1])(*t.GIVEN)\n"
        "assert torch.equal(made, torch.load(sys.argv[1] + '/first.pt'))"
    )
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=os.environ | {"PYTHONPATH": here}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_other_weights_numbers_and_shapes_are_converted_anew(tmp_path, converted):
    def ask(network, *asked):
        converter(network, tmp_path)(*asked)
        return len(converted)

    assert ask(unet(), *GIVEN) == 1
    assert ask(unet(), *GIVEN) == 1
    other = unet()
    other.conv_out.bias[0] += 1e-6
    assert ask(other, *GIVEN) == 2
    assert ask(unet(config=replace(tiny.SHALLOW, attention_head_dim=2)), *GIVEN) == 3  # heads: the same weights
    assert ask(unet(), GIVEN[0], GIVEN[1], GIVEN[2][:1]) == 4
    assert len([*(tmp_path / "openvino").iterdir()]) == 4


@pytest.mark.parametrize("name, size", [("network.xml", 1000), ("network.bin", 1000), ("network.bin", None)])
def test_broken_files_are_made_anew(tmp_path, converted, name, size):
    first = converter(unet(), tmp_path)(*GIVEN)
    (path,) = tmp_path.glob(f"openvino/*/{name}")
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    with pytest.warns(UserWarning, match="cannot be read, it is made anew"):
        assert torch.equal(converter(unet(), tmp_path)(*GIVEN), first)
    assert torch.equal(converter(unet(), tmp_path)(*GIVEN), first) and len(converted) == 2


def test_what_cannot_be_kept_is_said(tmp_path, monkeypatch):
    """Without room, and in a folder that is none; nothing half-written stays."""
    first = converter(unet())(*GIVEN)
    full = "minidiffedit.kernels.openvino.shutil.disk_usage"
    monkeypatch.setattr(full, lambda folder: type("Disk", (), {"free": 2**30}))
    with pytest.warns(UserWarning, match=r"not kept for later runs: .* GB and a GiB to spare are wanted"):
        assert torch.equal(converter(unet(), tmp_path)(*GIVEN), first)
    assert not [*(tmp_path / "openvino").iterdir()]
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept for later runs"):
        assert torch.equal(converter(unet(), tmp_path / "file")(*GIVEN), first)


def test_nothing_is_reported_over_the_internet(monkeypatch):
    def report(*_, **__):
        raise AssertionError("telemetry")

    monkeypatch.setattr("openvino.tools.ovc.convert_impl.init_ovc_telemetry", report)
    converter(unet())(*GIVEN)


def test_gradients_are_refused():
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient; load the model without compile"):
        converter(unet())(GIVEN[0].clone().requires_grad_(), *GIVEN[1:])


def test_what_cannot_be_converted_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(UNet, "forward", lambda self, x, *_: torch.linalg.eigvals(x).real)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with pytest.raises(RuntimeError, match=r"^compiling the UNet for .* failed: OpenVINO cannot .*without compile"):
        CompiledUNet(unet(), "openvino")(GIVEN[0], 481, GIVEN[2])


def test_short_memory_is_said_before_the_system_kills(monkeypatch):
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    assert 0 < ours.free_memory() < pages * page / 2**30
    monkeypatch.setattr(ours, "free_memory", lambda: 0.0)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with pytest.raises(
        RuntimeError, match=r"failed: OpenVINO holds some .* GiB for each shape, 0\.0 GiB are free; load"
    ):
        CompiledUNet(unet(), "openvino")(GIVEN[0], 481, GIVEN[2])


def test_a_whole_edit(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    made = []
    for compiled in (False, True):
        net, vae, clip = tiny.networks(unet=tiny.SHALLOW)
        sd = StableDiffusion(net, vae, clip, tiny.tokenizer())
        if compiled:
            sd.unet, sd.vae = CompiledUNet(net, "openvino"), compiled_vae(vae, "openvino")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            done = edit(sd, tiny.picture().resize((64, 64)), target="a", source="b", steps=4, maps=2, seed=1)
        made.append((done.x0, done.latent, sd.decode(done.latent)))
    assert all(error(ours, plain) <= 1e-4 for ours, plain in zip(made[1], made[0]))
    assert set(sd.unet.seconds) == {(2, 4, 8, 8), (1, 1, 8, 8), (1, 2, 8, 8)}
    assert len([*(tmp_path / "openvino").iterdir()]) == 3 + 2
