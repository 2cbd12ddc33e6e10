"""A run on a model is what it is alone: beside other threads', under autocast, in inference mode."""

import threading

import pytest
import tiny
import torch
from stubs import latent

from minidiffedit import Steering, edit, generate
from minidiffedit.kernels.together import together

FEW = {"source": "a horse", "seed": 1, "steps": 4, "maps": 2, "paste": False}
TARGETS = ("a zebra", "a cow on a beach", "two dogs")


@pytest.fixture(scope="module")
def sd():
    return tiny.model(unet=tiny.QUICK)


def at_once(*works):
    """What each returns or raises, all of them begun together, each in a thread."""
    made, start = [None] * len(works), threading.Barrier(len(works))

    def work(i):
        start.wait()
        try:
            made[i] = works[i]()
        except Exception as error:
            made[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(works))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return made


def test_edits_in_threads_are_those_made_one_after_another(sd):
    works = [lambda target=target: edit(sd, tiny.picture(), target=target, **FEW) for target in TARGETS]
    works += [lambda: generate(sd, "a cow", steps=3, seed=2)]
    alone = [work() for work in works]
    for one, other in zip(alone, at_once(*works), strict=True):
        assert torch.equal(one.latent, other.latent) and one.evaluations == other.evaluations


@torch.no_grad()
def test_predictions_asked_in_threads_are_those_asked_alone(sd):
    """Without a run: what is kept of texts is each thread's own."""
    texts = [[latent(1, 77, 24, seed=seed, dtype=torch.float32)] for seed in range(3)]
    x = latent(1, 4, 8, 8, dtype=torch.float32)

    def walk(text):
        with torch.no_grad():  # of this thread
            return torch.cat([sd.eps(x, t, text)[0] for t in range(1, 900, 20)])

    alone = [walk(text) for text in texts]
    for one, other in zip(alone, at_once(*[lambda text=text: walk(text) for text in texts]), strict=True):
        assert torch.is_tensor(other) and torch.equal(one, other)


def test_a_run_within_a_run(sd):
    """Of one thread: whoever watches may edit with the same model."""
    inside = []

    def watch(step):
        if not inside:
            inside.append(edit(sd, tiny.picture(), target="a cow", **FEW))

    done = edit(sd, tiny.picture(), target="a zebra", watch=watch, **FEW)
    assert torch.equal(done.latent, edit(sd, tiny.picture(), target="a zebra", **FEW).latent) and inside[0].rows


@pytest.mark.parametrize("method", ["diffedit", "null-text+replay", "pix2pix-zero"])
@pytest.mark.parametrize("context", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
def test_a_context_around_a_run_changes_no_bit(sd, method, context):
    options = {"target": "a zebra", "source": "a horse", "seed": 1, "steps": 2, "paste": False}
    plain = edit(sd, tiny.picture(), method, **options)
    with context():
        other = edit(sd, tiny.picture(), method, **options)
    assert torch.equal(plain.latent, other.latent) and plain.image.tobytes() == other.image.tobytes()


@pytest.mark.parametrize("context", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
def test_a_context_around_runs_made_at_once_changes_no_bit(sd, context):
    def latents():
        works = [lambda model, target=target: iter([edit(model, tiny.picture(), target=target, **FEW)])
                 for target in TARGETS]  # fmt: skip
        return {one.settings["target"]: one.latent for one in together(sd, works, 3)}

    plain = latents()
    with context():
        other = latents()
    assert {*plain} == {*TARGETS} and all(torch.equal(plain[target], other[target]) for target in TARGETS)


def test_a_model_that_was_loaded_in_inference_mode_still_learns(tmp_path):
    folder = tiny.write_folder(tmp_path, unet=tiny.QUICK)
    with torch.inference_mode():
        sd = type(tiny.model()).load(folder, device="cpu")
    assert edit(sd, tiny.picture(), "null-text+replay", target="a zebra", source="a horse", steps=2).rows


@pytest.mark.parametrize("given, said", [
    ({"steering": {"dilate": 1}}, "take a Steering and Results, got a dict"),
    ({"reuse": "run.safetensors"}, "take a Steering and Results, got a str"),
    ({"reuse": [3]}, "take a Steering and Results, got a int"),
])  # fmt: skip
def test_what_is_no_steering_and_no_result_is_refused(sd, given, said):
    with pytest.raises(ValueError, match=said):
        edit(sd, tiny.picture(), target="a zebra", **FEW, **given)
    none = edit(sd, tiny.picture(), target="a zebra", **FEW, steering=None, reuse=None)
    assert torch.equal(none.latent, edit(sd, tiny.picture(), target="a zebra", **FEW, steering=Steering()).latent)


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"as StableDiffusion.load gives it, got str"):
        edit("mini", tiny.picture(), target="a zebra", **FEW)
