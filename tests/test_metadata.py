"""What a written picture says about its making, read back."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidiffedit import StableDiffusion, cli, edit, execute, generate, plan
from minidiffedit.files import images
from minidiffedit.files.metadata import describe_result, identity, metadata, model_hash, quoted, sha256
from minidiffedit.run import blank_plan

PROMPTS = [
    "a zebra",
    "",
    'a "striped" horse, running: fast',
    "シマウマ 🦓 naïve",
    "two\nlines",
    "back\\slash",
    "x" * 3000,
]
SETTINGS = {"steps": 4, "seed": 0, "strength": 0.0, "source": "a horse", "working_size": (64, 72), "model": "a, b"}
SETTINGS |= {"mask": "computed"}


def read_texts(path):
    """`parameters` and `minidiffedit` of a file in any of the three formats."""
    with Image.open(path) as file:
        if file.format == "PNG":
            return file.text.get("parameters"), file.text.get("minidiffedit")
        comment = file.getexif().get_ifd(0x8769).get(0x9286)
    if comment is None:
        return None, None
    assert comment[:8] == b"UNICODE\0"
    parameters, _, record = comment[8:].decode("utf-16-be").rpartition(", minidiffedit: ")
    return parameters, json.loads(record)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: p[:9])
def test_texts_come_back_from_every_format(tmp_path, suffix, prompt):
    texts = metadata(SETTINGS | {"negative_prompt": prompt}, prompt)
    images.write_picture(Image.new("RGB", (9, 9)), tmp_path / f"a.{suffix}", texts)
    assert read_texts(tmp_path / f"a.{suffix}") == (texts["parameters"], texts["minidiffedit"])
    record = json.loads(texts["minidiffedit"])
    assert record["prompt"] == record["negative_prompt"] == prompt and record["edited"] is True
    images.write_picture(Image.new("RGB", (9, 9)), tmp_path / f"b.{suffix}")
    assert read_texts(tmp_path / f"b.{suffix}") == (None, None)


def test_parameters_are_the_neighbours_lines():
    lines = metadata(SETTINGS | {"negative_prompt": "blur", "mask_clip": None}, "a zebra")["parameters"].split("\n")
    assert lines == [
        "a zebra",
        "Negative prompt: blur",
        'Steps: 4, Sampler: DDIM, Seed: 0, Size: 64x72, Model: "a, b", Denoising strength: 0.0, Source prompt: a horse',
    ]
    assert metadata({"steps": 1}, "p")["parameters"] == "p\nSteps: 1, Sampler: DDIM"
    assert json.loads(metadata({"steps": 1}, "p")["minidiffedit"])["edited"] is False


# The two patterns with which AUTOMATIC1111's viewer takes the last line apart.
PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_neighbours_viewers_find_their_keys_in_exif(tmp_path, suffix):
    texts = metadata(SETTINGS | {"source": 'a "horse", CFG scale: 3, brown'}, 'a zebra: CFG scale: 9, "x"')
    images.write_picture(Image.new("RGB", (9, 9)), tmp_path / f"a.{suffix}", texts)
    with Image.open(tmp_path / f"a.{suffix}") as file:
        comment = file.getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")
    found = dict(PARAM.findall(comment.split("\n")[-1]))
    assert found["Steps"] == "4" and found["Seed"] == "0" and "CFG scale" not in found
    assert json.loads(json.loads(found["minidiffedit"]))["steps"] == 4


def test_settings_too_long_for_jpeg_are_left_out_with_a_warning(tmp_path):
    texts = metadata(SETTINGS, "zebra " * 10_000)
    with pytest.warns(UserWarning, match="too long for JPEG"):
        images.write_picture(Image.new("RGB", (9, 9)), tmp_path / "a.jpg", texts)
    assert read_texts(tmp_path / "a.jpg") == (None, None)
    for name in ("a.webp", "a.png"):
        images.write_picture(Image.new("RGB", (9, 9)), tmp_path / name, texts)
        assert read_texts(tmp_path / name)[1] == texts["minidiffedit"]


@pytest.mark.parametrize("value, text", [
    ("plain", "plain"), (0.5, "0.5"), ("a,b", '"a,b"'), ('"', '"\\""'), ("a:b", '"a:b"'), ("é\n", '"é\\n"'),
])  # fmt: skip
def test_values_are_quoted_where_they_must_be(value, text):
    assert quoted(value) == text


def test_model_hash(tmp_path):
    blob = tmp_path / "blobs" / "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"
    blob.parent.mkdir()
    blob.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(blob)
    assert model_hash(blob) == "ba7816bf8f"  # sha256 of abc
    assert model_hash(tmp_path / "link") == "6ce0161689"  # the hub's cache: named by its hash
    assert sha256(tmp_path / "link").startswith("ba7816bf8f01cfea")  # which `verify` does not trust


def test_a_hash_is_the_files_of_now(tmp_path, monkeypatch):
    """Not that of another file which stood under the name before, nor of the same name in another folder."""
    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    assert sha256(Path("a")).startswith("ba7816bf8f01cfea")
    (tmp_path / "b").write_bytes(b"other")
    (tmp_path / "b").replace("a")
    assert sha256(Path("a")).startswith("d9298a10d1b07358")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "a").write_bytes(b"abc")
    monkeypatch.chdir("deeper")
    assert sha256(Path("a")).startswith("ba7816bf8f01cfea")


def arguments_of(record):
    """What a record says of the method and its arguments."""
    blank = blank_plan(record["method"])
    return {name: record[name] for name in record.keys() & {"method", *blank.given, *blank.options} - {"mask"}}


EDIT = ["--target", "a zebra, \"striped\"", "--source", "a horse", "--steps", "4", "--maps", "2", "--size", "64",
        "--negative-prompt", "blur", "--mask-clip", "none", "--encode-text", "source", "--refine", "2"]  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_the_record_in_a_picture_suffices_to_make_it_again(tmp_path, folder, sd, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 91, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    path = tmp_path / f"out.{suffix}"
    command = ["edit", str(tmp_path / "in.png"), *EDIT, "--model", str(folder), "-o", str(path)]
    assert cli.main(command) == 0
    first, record = path.read_bytes(), json.loads(read_texts(path)[1])
    assert record["mask"] == "computed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of the defaults in it is a wish that came to nothing
        done = edit(sd, pixels, **arguments_of(record))  # a drawn seed stands in the record too
    again = tmp_path / f"again.{suffix}"
    images.write_picture(done.image, again)
    with Image.open(again) as a, Image.open(path) as b:
        assert a.tobytes() == b.tobytes()
    assert cli.main([*command, "--seed", str(record["seed"])]) == 0
    assert path.read_bytes() == first


def test_another_seed_is_another_picture_and_no_metadata_is_none(tmp_path, folder):
    Image.effect_noise((91, 70), 50).save(tmp_path / "in.png")
    path = tmp_path / "out.png"
    command = ["edit", str(tmp_path / "in.png"), *EDIT, "--model", str(folder), "-o", str(path), "--overwrite"]
    pixels = []
    for options in (["--seed", "0", "--no-metadata"], ["--seed", "1"]):
        assert cli.main([*command, *options]) == 0
        assert (read_texts(path) == (None, None)) == ("--no-metadata" in options)
        with Image.open(path) as file:
            pixels.append(file.tobytes())
    assert pixels[0] != pixels[1]


def test_a_generations_record_suffices_too(tmp_path, folder, sd):
    path = tmp_path / "g.png"
    command = ["generate", "a zebra", "--steps", "4", "--height", "72", "--model", str(folder), "-o", str(path)]
    assert cli.main(command) == 0
    record = json.loads(read_texts(path)[1])
    assert record["edited"] is False and record["prompt"] == "a zebra"
    arguments = arguments_of(record)
    assert arguments.pop("method") == "text-to-image" and arguments.pop("target") == "a zebra"
    done = generate(sd, record["prompt"], height=72, **arguments)
    with Image.open(path) as file:
        assert file.size == (64, 72) and file.tobytes() == done.image.tobytes()
    assert "Size: 64x72" in read_texts(path)[0]


def test_no_clock_path_or_version_stands_in_a_picture(tmp_path, folder):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    command = ["edit", str(tmp_path / "in.png"), *EDIT, "--model", str(folder), "-o", str(tmp_path / "out.png")]
    assert cli.main([*command, "--mask", str(tmp_path / "mask.png")]) == 0
    record = json.loads(read_texts(tmp_path / "out.png")[1])
    assert record["model"] == folder.name and record["model_hash"] and record["dtype"] == "float32"
    assert record["mask"] == model_hash(tmp_path / "mask.png")
    assert set(record) == {
        "chunk", "crop", "crop_margin", "dtype", "edited", "encode_text", "grey", "guidance_scale", "maps",
        "mask", "mask_clip", "mask_strength", "mask_threshold", "method", "model", "model_hash",
        "negative_prompt", "paste", "prompt", "prompt_syntax", "refine", "sampler", "seed", "size", "source",
        "steps", "strength", "target", "working_size",
    }  # fmt: skip
    assert str(tmp_path.parent) not in (tmp_path / "out.png").read_bytes().decode("latin-1")
    with Image.open(tmp_path / "out.png") as file:
        assert set(file.text) == {"parameters", "minidiffedit"}


# ---------------------------------------------------------------- of a result


@pytest.mark.filterwarnings("ignore:edit 2 leaves")
def test_any_result_describes_itself(sd):
    picture = Image.effect_noise((64, 64), 50)
    pairs = plan("diffedit-regions", edits=[("a horse", "a zebra"), ("grass", "sand, dry")], steps=2, maps=1, seed=0)
    few = {"steps": 2, "seed": 0}
    for done, prompt, edited in (
        (edit(sd, picture, target="a zebra", mask=np.ones((64, 64)), **few), "a zebra", True),
        (edit(sd, picture, "masactrl", target="a zebra", **few), "a zebra", True),
        (edit(sd, picture, "reconstruction", source="a horse", **few), "", True),
        (execute(pairs, sd, picture), "a zebra; sand, dry", True),
        (generate(sd, "a zebra", **few), "a zebra", False),
    ):  # fmt: skip
        texts = describe_result(done)
        lines, record = texts["parameters"].split("\n"), json.loads(texts["minidiffedit"])
        assert lines[0] == record["prompt"] == prompt and record["edited"] is edited, done.method
        assert record["method"] == done.method and done.settings.keys() < record.keys()
        assert lines[-1].startswith("Steps: 2, Sampler: DDIM") and "Seed: 0, Size: 64x64, Model: in memory" in lines[-1]


def test_a_saved_result_is_what_the_command_writes(tmp_path, folder):
    Image.effect_noise((64, 64), 50).save(tmp_path / "in.png")
    options = ["--target", "a zebra", "--steps", "2", "--maps", "1", "--seed", "0", "--model", str(folder)]
    assert cli.main(["edit", str(tmp_path / "in.png"), *options, "-o", str(tmp_path / "a.png")]) == 0
    sd = StableDiffusion.load(folder, device="cpu")
    assert identity(sd)["model_hash"] == sha256(folder / "unet" / "diffusion_pytorch_model.safetensors")[:10]
    edit(sd, tmp_path / "in.png", target="a zebra", steps=2, maps=1, seed=0).save(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("method, sampler", [
    ("diffedit", "DDIM"), ("sdedit", "DDIM"), ("edit-friendly-ddpm", "DDPM"), ("ledits++", "DPM++ 2M SDE"),
    ("tf-icon", "DPM++ 2M"),
    ("edit-friendly+prompt-to-prompt", "DDPM"), ("ddim+edit-friendly-ddpm", "DDIM"), ("cycle-diffusion", "DDIM"),
    ("sde-diffedit", "DDPM"), ("sde-drag", "DDPM"), ("dds", "none: gradient descent"), ("instruct-pix2pix", "DDIM"),
])  # fmt: skip
def test_the_sampler_is_who_steps(method, sampler):
    from minidiffedit.run import blank_plan

    blank = blank_plan(method)
    line = metadata({"method": blank.method} | blank.settings, "p")["parameters"].split("\n")[-1]
    assert f"Sampler: {quoted(sampler)}, " in line + ", "
    assert ("Eta: " in line) == ("eta" in blank.options)  # DDIM's own word for how random its steps are
