"""A VAE from elsewhere, for any model and in every form; a wrong one is refused from its header; results tell of it."""

import json
import shutil

import pytest
import tiny
import torch
from commands import failed, ran
from files import hollow, manifest, save, single_state

from minidiffedit import StableDiffusion, edit, load_state, save_state
from minidiffedit.checkpoint import compvis_vae
from minidiffedit.cli import main
from minidiffedit.files import configs
from minidiffedit.files.metadata import describe_result, identity, model_hash

FAST = ["--target", "a zebra", "--source", "a horse", "--steps", "4", "--maps", "1", "--seed", "0"]
SPELLED = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}


def weights(scale=1.5):
    """The tiny VAE with another decoder."""
    state = tiny.networks()[1].state_dict()
    return {name: t * scale if name == "decoder.conv_out.weight" else t for name, t in state.items()}


def compvis(state):
    return {compvis_vae(name): t[..., None, None] if t.ndim == 2 else t for name, t in state.items()}


def spelled(state):
    for old, new in SPELLED.items():
        state = {key.replace(f"attn_1{old}", f"attn_1{new}"): t for key, t in state.items()}
    return state


def with_config(path, state, **changes):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(tiny.CONFIGS["vae"] | changes))
    return save(path / tiny.FILES["vae"], state)


def in_a_model(folder, path):
    shutil.copytree(folder, path)
    shutil.rmtree(path / "vae")
    with_config(path / "vae", weights())
    return path


FORMS = {
    "file with its config": lambda folder, p: with_config(p / "v", weights()),
    "folder": lambda folder, p: with_config(p / "v", weights()).parent,
    "folder, fp16 alone": lambda folder, p: with_config(p / "v", weights()).rename(
        p / "v" / "diffusion_pytorch_model.fp16.safetensors").parent,
    "folder of one file": lambda folder, p: save(p / "v" / "mine.safetensors", compvis(weights())).parent,
    "file alone, ours": lambda folder, p: save(p / "v.safetensors", weights()),
    "file alone, CompVis'": lambda folder, p: save(p / "v.safetensors", compvis(weights())),
    "named .ckpt, to_q": lambda folder, p: save(p / "v.ckpt", spelled(compvis(weights()))),
    "with a loss": lambda folder, p: save(p / "v.safetensors", compvis(weights()) | {"loss.logvar": torch.zeros(1)}),
    "with its prefix": lambda folder, p: save(
        p / "v.safetensors", {f"first_stage_model.{key}": t for key, t in compvis(weights()).items()}),
    "a whole single file": lambda folder, p: save(
        p / "m.safetensors", single_state() | {f"first_stage_model.{k}": t for k, t in compvis(weights()).items()}),
    "a model's folder": lambda folder, p: in_a_model(folder, p / "m"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*ignored 1 tensor that")
@pytest.mark.parametrize("model, form", [
    *(("single without", form) for form in FORMS),
    *((model, form) for model in ("folder", "folder without", "single") for form in (
        "file with its config", "file alone, CompVis'", "a whole single file")),
])  # fmt: skip
def test_every_form_and_every_model(model, form, folder, tmp_path, small_single_files):
    if model.startswith("single"):
        state = {k: t for k, t in single_state().items() if "without" not in model or "first_stage" not in k}
        path = save(tmp_path / "model.safetensors", state)
    else:
        path = shutil.copytree(folder, tmp_path / "model")
        if "without" in model:
            shutil.rmtree(path / "vae")
    sd = StableDiffusion.load(path, vae=FORMS[form](folder, tmp_path / "other"), device="cpu")
    expected = weights()
    for name, tensor in sd.vae.state_dict().items():
        assert tensor.equal(expected[name]), name
    assert sd.unet.conv_in.weight.equal(tiny.networks()[0].conv_in.weight)


def test_full_size_ones_open_by_their_header_alone(tmp_path):
    from minidiffedit.checkpoint import open_checkpoint

    entries = manifest("single")
    without = {key: one for key, one in entries.items() if not key.startswith("first_stage_model.")}
    model = hollow(tmp_path / "model.safetensors", without)
    for name in ("vae", "vae, old names"):
        vae = hollow(tmp_path / "vae.safetensors", manifest(name))
        assert open_checkpoint(model, vae=vae).parts["vae"].path == vae
    renamed = {key.removeprefix("first_stage_model."): e for key, e in entries.items() if "first_stage" in key}
    vae = hollow(tmp_path / "mse.safetensors", renamed)
    assert open_checkpoint(model, vae=vae).configs["vae"].scaling_factor == 0.18215


# ---------------------------------------------------------------- wrong ones


def wide(state, channels):
    return state | {"decoder.conv_in.weight": torch.zeros(16, channels, 3, 3)}


def named(*keys, shape=(4, 24)):
    return {key: torch.zeros(shape) for key in keys}


WRONG = {
    "SDXL's by its config": (lambda p: with_config(p, weights(), scaling_factor=0.13025), "SDXL's VAE, whose latents"),
    "SDXL's by its metadata": (lambda p: save(p / "v.safetensors", weights(), {"modelspec.architecture":
                               "stable-diffusion-xl-v1-base/vae"}), "SDXL's VAE"),
    "other latents": (lambda p: with_config(p, weights(), scaling_factor=0.5), "other latents: scaled by 0.5"),
    "16 channels": (lambda p: save(p / "v.safetensors", wide(weights(), 16)), "latents have 16 channels .*Flux"),
    "16 by its config": (lambda p: with_config(p, wide(weights(), 16), latent_channels=16, shift_factor=0.1),
                         "latents have 16 channels"),
    "films": (lambda p: save(p / "v.safetensors", weights() | {"decoder.conv_in.weight": torch.zeros(16, 4, 3, 3, 3)}),
              "a VAE of films"),
    "the UNet": (lambda p: save(p / "v.safetensors", tiny.tensors("unet", tiny.networks()[0])), "only the UNet"),
    "the text encoder": (lambda p: save(p / "v.safetensors", tiny.tensors("text_encoder", tiny.networks()[2])),
                         "only the text encoder"),
    "a LoRA": (lambda p: save(p / "v.safetensors", named("lora_unet_x.lora_down.weight", "y")), "is a LoRA"),
    "an SDXL checkpoint": (lambda p: save(p / "v.safetensors", named("conditioner.embedders.0.x", "y")), "SDXL check"),
    "something else": (lambda p: save(p / "v.safetensors", named("a", "b", "c")), "no VAE: it holds no decoder"),
    "a deeper one": (lambda p: save(p / "v.safetensors", weights() | {"decoder.up_blocks.9.x": torch.zeros(1)}),
                     "1 unknown: decoder.up_blocks.9.x"),
    "a part missing": (lambda p: save(p / "v.safetensors", {k: t for k, t in weights().items() if "quant" not in k}),
                       "4 missing: post_quant_conv.bias"),
    "nothing": (lambda p: p / "nowhere", "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_ones_are_refused_before_weights_are_read(kind, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minidiffedit.sd.load_network", lambda *a: pytest.fail("weights were read"))
    make, words = WRONG[kind]
    vae = make(tmp_path / "v")
    with pytest.raises(ValueError, match=words):
        StableDiffusion.load(folder, vae=vae, device="cpu")
    line = failed(capsys, "generate", "x", "--model", folder, "--vae", vae, "-o", tmp_path / "x.png")
    assert line.count("\n") == 1


def test_sdxls_published_file_is_known_by_its_hash(tmp_path, monkeypatch):
    """Name by name and shape by shape it is SD v1's."""
    path = hollow(tmp_path / "vae.safetensors", manifest("vae"))
    assert configs.vae_config(path, None) == configs.VAEConfig()
    monkeypatch.setattr(configs, "SDXL_VAES", (model_hash(path),))
    with pytest.raises(ValueError, match="SDXL's VAE"):
        configs.vae_config(path, None)


def test_a_model_without_one_says_what_to_give(folder, tmp_path, small_single_files):
    state = {k: t for k, t in single_state().items() if "first_stage" not in k}
    with pytest.raises(ValueError, match="without its VAE; give one by --vae"):
        StableDiffusion.load(save(tmp_path / "m.safetensors", state), device="cpu")
    path = shutil.copytree(folder, tmp_path / "m")
    shutil.rmtree(path / "vae")
    with pytest.raises(ValueError, match="no folder vae/; give one by --vae"):
        StableDiffusion.load(path, device="cpu")


# ---------------------------------------------------------------- what results tell


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return with_config(tmp_path_factory.mktemp("vae") / "better", weights())


def test_results_and_states_tell_of_it(other, folder, tmp_path, picture):
    sd = StableDiffusion.load(folder, vae=other, device="cpu")
    done = edit(sd, picture, source="a horse", target="a zebra", steps=4, maps=1, seed=0)
    assert identity(sd) | {"vae": other.name, "vae_hash": model_hash(other)} == identity(sd)
    assert f"VAE hash: {model_hash(other)}, VAE: {other.name}" in describe_result(done)["parameters"]
    save_state(done, tmp_path / "s.safetensors")
    assert load_state(tmp_path / "s.safetensors", sd).image.tobytes() == done.image.tobytes()
    plain = StableDiffusion.load(folder, device="cpu")
    assert "vae" not in identity(plain)
    with pytest.raises(ValueError, match=rf"its vae is {model_hash(other)}, here it is \w+; pass --vae {other}"):
        load_state(tmp_path / "s.safetensors", plain)
    save_state(edit(plain, picture, target="a zebra", steps=4, maps=1, seed=0), tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"its vae is .* leave out --vae"):
        load_state(tmp_path / "p.safetensors", sd)


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    return tmp_path


def test_commands_take_it_where_they_take_a_model(other, folder, here, capsys):
    model = ["--model", folder]
    with_it = [*model, "--vae", other]
    done = ran(capsys, "edit", "in.png", *FAST, *with_it, "--save-state", "s.safetensors")
    assert done["settings"]["vae_hash"] == done["model"]["vae_hash"] == model_hash(other)
    told = ran(capsys, "resume", "s.safetensors", "--mask-threshold", ".3", *with_it)
    assert told["settings"]["vae"] == other.name
    assert "pass --vae" in failed(capsys, "resume", "s.safetensors", *model)
    assert ran(capsys, "sheet", "in.png", *FAST, *with_it, "--rows", "strength=.5")["settings"]["vae"] == other.name
    assert ran(capsys, "mask", "in.png", *FAST, *with_it)["settings"]["vae"] == other.name
    (here / "set.csv").write_text("image,target,source\nin.png,a zebra,a horse\n")
    options = ["--steps", "4", "--maps", "1", *with_it, "--no-plots"]
    assert ran(capsys, "eval", "set.csv", *options)["model"]["vae_hash"] == model_hash(other)


def test_a_batch_is_made_again_with_another_vae(other, folder, here, capsys):
    (here / "rows.csv").write_text("image,target\nin.png,a zebra\n")
    command = ["batch", "rows.csv", "-o", "out", "--steps", "4", "--maps", "1", "--model", folder]
    assert ran(capsys, *command)["made"] == 1
    assert ran(capsys, *command)["already there"] == 1
    assert ran(capsys, *command, "--vae", other)["made"] == 1


def test_info_names_a_vae_and_what_takes_it(other, tmp_path, capsys):
    words = "a VAE for Stable Diffusion v1; taken by --vae of every command that edits"
    assert main(["info", str(hollow(tmp_path / "v.safetensors", manifest("vae")))]) == 0
    assert words in capsys.readouterr().out
    odd = with_config(tmp_path / "odd", weights(), scaling_factor=0.5).parent
    assert ran(capsys, "info", odd) == {
        "model": str(odd), "kind": "a VAE", "for": "a model whose latents are scaled by 0.5", "use": "--vae",
    }  # fmt: skip
    assert "SDXL's VAE" in failed(capsys, "info", with_config(tmp_path / "xl", weights(), scaling_factor=0.13025))
