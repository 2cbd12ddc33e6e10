"""SD v1 models whose UNet predicts v: told by every sign that there is, and turned into noise exactly."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from commands import failed, ran
from diffusers import DDIMScheduler
from explicit import scheduler
from files import hollow, manifest, raw, save, single_state
from mutants import mutant

from minidiffedit import StableDiffusion, edit, load_state, save_state
from minidiffedit.checkpoint import open_checkpoint
from minidiffedit.ddim import alpha_bar, move
from minidiffedit.files.unsupported import read_header

EMPTY = torch.zeros(0)
COMPVIS = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    linear_start: 0.00085\n"
COMPVIS += "    linear_end: 0.0120\n    timesteps: 1000\n    scale_factor: 0.18215\n"
# Sign -> (text of a .yaml, metadata, tensors)
SIGNS = {
    "yaml": (COMPVIS + '    parameterization: "v"\n', {}, {}),
    "yaml, bare": ("model: {params: {parameterization: v}}", {}, {}),
    "yaml, quoted": ("{'model': {'params': {'parameterization': 'v'}}}", {}, {}),
    "modelspec": ("", {"modelspec.prediction_type": "v"}, {}),
    "modelspec, long": ("", {"modelspec.prediction_type": "v_prediction"}, {}),
    "predict_key": ("", {"modelspec.predict_key": "v"}, {}),
    "kohya": ("", {"ss_v_parameterization": "True"}, {}),
    "tensor": ("", {}, {"v_pred": EMPTY}),
    "two that agree": ("parameterization: v", {"modelspec.prediction_type": "v"}, {"v_pred": EMPTY}),
}
PLAIN = {
    "nothing": ("", {}, {}),
    "yaml": (COMPVIS + "    parameterization: eps\n", {}, {}),
    "yaml, in a comment": ('# parameterization: "v"\nmodel:  # parameterization: v\n', {}, {}),
    "modelspec": ("", {"modelspec.prediction_type": "epsilon"}, {}),
    "kohya": ("", {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, {}),
    "schedule without data": ("", {}, {"alphas_cumprod": torch.zeros(1000)}),
    "SD v1's schedule": ("", {}, {"alphas_cumprod": torch.tensor(alpha_bar())}),
    "yaml without a zero SNR": ("rescale_betas_zero_snr: false", {}, {}),
}
ZERO = {
    "yaml": ("rescale_betas_zero_snr: true\nparameterization: v", {}, {}),
    "yaml, ztsnr": ("ztsnr: True", {}, {}),
    "kohya": ("", {"ss_zero_terminal_snr": "True"}, {}),
    "tensor": ("", {}, {"v_pred": EMPTY, "ztsnr": EMPTY}),
    "schedule": ("", {}, {"alphas_cumprod": torch.tensor([*alpha_bar()[:-1], 0.0])}),
    "schedule, A1111's": ("", {}, {"alphas_cumprod": torch.tensor([*alpha_bar()[:-1], 4.8973451890853435e-08])}),
}
OTHER = {
    "sample": (("parameterization: x0", {}, {}), "a x0 model .*only epsilon and v prediction"),
    "modelspec": (("", {"modelspec.prediction_type": "sample"}, {}), "a sample model .modelspec.prediction_type"),
    "contradiction": (("parameterization: eps", {}, {"v_pred": EMPTY}), "the tensor v_pred says .* v, m.yaml says eps"),
    "schedule": (("linear_start: 0.0001", {}, {}), "m.yaml: linear_start is 0.0001; SD v1 has 0.00085"),
    "steps": (("timesteps: 4000", {}, {}), "timesteps is 4000; SD v1 has 1000"),
    "scale": (("scale_factor: 0.13025", {}, {}), "scale_factor is 0.13025; SD v1 has 0.18215"),
}


def single(tmp_path, sign, suffix=".yaml"):
    yaml, metadata, tensors = sign
    if yaml:
        (tmp_path / f"m{suffix}").write_text(yaml)
    return save(tmp_path / "m.safetensors", single_state() | tensors, metadata)


@pytest.mark.parametrize("sign", SIGNS)
def test_a_single_file_tells_that_it_predicts_v(sign, tmp_path, small_single_files, capsys):
    path = single(tmp_path, SIGNS[sign], ".yml" if sign == "yaml, bare" else ".yaml")
    if sign == next(iter(SIGNS)):
        assert StableDiffusion.load(path, device="cpu").prediction == "v"
    assert "Stable Diffusion v1, v-prediction" in ran(capsys, "info", path)["kind"]


@pytest.mark.parametrize("sign", PLAIN)
def test_a_single_file_predicts_noise_otherwise(sign, tmp_path, small_single_files):
    assert open_checkpoint(single(tmp_path, PLAIN[sign])).prediction == "epsilon"


def of_the_folder(folder, tmp_path, config=None, metadata=None, tensors=()):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m/scheduler/scheduler_config.json").write_text(json.dumps(tiny.SCHEDULER | (config or {})))
    if metadata or tensors:
        state = tiny.tensors("unet", tiny.networks(unet=tiny.QUICK)[0]) | dict.fromkeys(tensors, EMPTY)
        save(tmp_path / "m/unet" / tiny.FILES["unet"], state, metadata)
    return tmp_path / "m"


FOLDERS = {
    "config": {"config": {"prediction_type": "v_prediction"}},
    "metadata": {"metadata": {"modelspec.prediction_type": "v"}},
    "tensor": {"tensors": ["v_pred"]},
}


@pytest.mark.parametrize("sign", FOLDERS)
def test_a_folder_tells_that_it_predicts_v(sign, folder, tmp_path):
    assert StableDiffusion.load(of_the_folder(folder, tmp_path, **FOLDERS[sign]), device="cpu").prediction == "v"


REASON = "zero-terminal-SNR model .*alpha_bar is 0.*use a model without it"


@pytest.mark.parametrize("sign", ZERO)
def test_zero_terminal_snr_is_refused_with_its_reason(sign, tmp_path, small_single_files, capsys):
    path = single(tmp_path, ZERO[sign])
    with pytest.raises(ValueError, match=REASON):
        StableDiffusion.load(path, device="cpu")
    assert "zero-terminal-SNR" in failed(capsys, "info", path)


@pytest.mark.parametrize(
    "sign",
    [
        {"config": {"rescale_betas_zero_snr": True}},
        {"config": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}},
        {"tensors": ["v_pred", "ztsnr"]},
        {"metadata": {"ss_zero_terminal_snr": "True"}},
    ],
)
def test_zero_terminal_snr_of_a_folder(sign, folder, tmp_path):
    with pytest.raises(ValueError, match=REASON):
        open_checkpoint(of_the_folder(folder, tmp_path, **sign))


@pytest.mark.parametrize("kind", OTHER)
def test_other_predictions_and_schedules_are_refused(kind, tmp_path, small_single_files):
    sign, words = OTHER[kind]
    with pytest.raises(ValueError, match=words):
        open_checkpoint(single(tmp_path, sign))


@pytest.mark.parametrize("name", ["1-v-by-metadata", "1-v-by-yaml", "v1.5 of mine"])
def test_full_size_files_tell_it_by_their_header_alone(name, tmp_path):
    metadata = {"modelspec.prediction_type": "v"} if "metadata" in name else None
    path = hollow(tmp_path / f"{name}.safetensors", manifest("single"), metadata)
    if not metadata:
        path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert open_checkpoint(path).prediction == "v"


def test_a_file_says_of_itself_what_stands_in_its_header(tmp_path):
    path = raw(tmp_path / "m.safetensors", {"__metadata__": {"a": "b"}})
    assert read_header(path).metadata == {"a": "b"}


# ---------------------------------------------------------------- the conversion


def of_v(make=tiny.model):
    sd = make()
    sd.prediction = "v"
    return sd


@pytest.mark.parametrize("t", [1, 500, 981, 999])
def test_v_of_a_known_noise_gives_that_noise(t, monkeypatch):
    """v = sqrt(a) eps - sqrt(1 - a) x0 by definition; the UNet is made to say it."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    a = alpha_bar()[t]
    x_t, v = a**0.5 * x0 + (1 - a) ** 0.5 * noise, a**0.5 * noise - (1 - a) ** 0.5 * x0
    sd = of_v()
    sd.unet = lambda x, t, text, attend: torch.cat([v, 2 * v])
    one, two = sd.eps(x_t, t, sd.text(["a", "b"]).split(1))
    assert (one - noise).abs().max() < 1e-5
    assert (two - (noise + a**0.5 * v)).abs().max() < 1e-5  # the second text's row, beside the same latents


def stepped(module=None):
    """x_t, moved down one step by ours and by diffusers' scheduler for v, over one UNet."""
    plain, sd = tiny.model(), of_v(tiny.model if module is None else lambda: module.StableDiffusion(*parts()))
    text, x = plain.text(["a horse"]), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    peer = DDIMScheduler.from_config(scheduler(20).config, prediction_type="v_prediction")
    peer.set_timesteps(20)
    worst = 0.0
    for t in peer.timesteps[:-1].tolist():
        (v,), (eps,) = plain.eps(x, t, [text]), sd.eps(x, t, [text])
        theirs = peer.step(v, t, x).prev_sample
        ours = move(x, eps, alpha_bar()[t], alpha_bar()[t - 50])
        worst, x = max(worst, float((ours - theirs).norm() / theirs.norm())), theirs
    return worst


def parts():
    made = tiny.model()
    return made.unet, made.vae, made.clip, made.tokenizer


def test_a_walk_equals_diffusers_for_v_prediction():
    assert stepped() < 1e-5


@pytest.mark.parametrize(
    "old, new",
    [
        ("(a**0.5 * predictions", "(predictions"),
        ("(1 - a) ** 0.5 * z", "(1 - a) * z"),
        ("torch.cat([x_t] * len(texts))", "torch.cat([x_t] * len(texts)).flip(-1)"),
    ],
)
def test_that_a_wrong_conversion_turns_it_red(old, new, monkeypatch):
    assert stepped(mutant("sd", old, new, monkeypatch)) > 1e-3


def test_gradients_pass_through_both_terms():
    sd, t = of_v(), 500
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    sd.unet = lambda x, t, text, attend: 3 * x
    (eps,) = sd.eps(x, t, [sd.text(["a"])])
    (grad,) = torch.autograd.grad(eps.sum(), x)
    a = alpha_bar()[t]
    assert torch.allclose(grad, torch.full_like(grad, 3 * a**0.5 + (1 - a) ** 0.5))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_convert_in_float32(dtype, folder, tmp_path):
    sd = StableDiffusion.load(of_the_folder(folder, tmp_path, **FOLDERS["config"]), device="cpu", dtype=dtype)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    v = torch.full_like(x, 0.25).to(sd.dtype)
    sd.unet = lambda *a: v
    (eps,) = sd.eps(x, 700, [sd.text(["a"])])
    a = alpha_bar()[700]
    assert eps.dtype == sd.dtype and eps.equal((a**0.5 * 0.25 + (1 - a) ** 0.5 * x).to(sd.dtype))


# ---------------------------------------------------------------- in results


def test_a_state_and_a_picture_say_what_the_model_predicts(folder, tmp_path, picture):
    """The weights alone may be those of a model that predicts noise: only the sign beside them differs."""
    path = of_the_folder(folder, tmp_path, **FOLDERS["config"])
    v, plain = (StableDiffusion.load(one, device="cpu") for one in (path, folder))
    done = edit(v, picture, source="a horse", target="a zebra", steps=4, maps=1, seed=0)
    assert done.latent.isfinite().all()
    save_state(done, tmp_path / "v.safetensors")
    assert load_state(tmp_path / "v.safetensors", v).latent.equal(done.latent)
    with pytest.raises(ValueError, match="its prediction is v, here it is epsilon; give the --model it was made with"):
        load_state(tmp_path / "v.safetensors", plain)
    save_state(SimpleNamespace(**vars(done) | {"sd": plain}), tmp_path / "eps.safetensors")
    with pytest.raises(ValueError, match="its prediction is epsilon, here it is v"):
        load_state(tmp_path / "eps.safetensors", v)
