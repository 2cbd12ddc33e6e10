"""MasaCtrl: its exact limits, the source's row, and the same edit with maps written out in diffusers' UNet."""

import sys
import warnings
from functools import partial

import pytest
import tiny
import torch
from explicit import error, maps, once, peer, scheduler
from mutants import mutant, run
from proofs import edited
from stubs import Model, latent

from minidiffedit import StableDiffusion, Tokenizer
from minidiffedit import run as R
from minidiffedit.attention import Site
from minidiffedit.methods import masactrl as M
from minidiffedit.methods.inversions import ddim, direct
from minidiffedit.methods.replay import replay
from minidiffedit.methods.words import words_of

N = 5
X0 = latent(1, 4, 8, 8, dtype=torch.float32)
EVERY = {"first_step": 0, "finest": 9}


@pytest.fixture(scope="module")
def sd(deep):
    return deep


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def loud():
    """The tiny network in float64, with self-attentions that weigh as much as the rest: random ones hardly count."""
    unet, vae, clip = (network.double() for network in tiny.networks())
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.to_out[0].weight.mul_(20)
    return StableDiffusion(unet, vae, clip, Tokenizer())


def texts(sd):
    return [sd.text([prompt]) for prompt in ("", "a horse", "a zebra")]


def path_of(sd, invert, x0=X0, strength=1.0):
    null, source, _ = texts(sd)
    with torch.no_grad():
        return invert(sd.eps, x0, null, source, steps=N, strength=strength)


class Rows:
    """Keeps what a model was asked, and whether with a tap."""

    def __init__(self, sd):
        self.sd, self.seen = sd, []

    def __call__(self, x, t, texts, *, tap=None):
        self.seen.append((x.clone(), t, tap is not None))
        return self.sd.eps(x, t, texts, **({"tap": tap} if tap else {}))


def by_maps(sd, path, first_step, finest, scale=7.5):
    """Equation 4 of the paper with each map built, one row after the other, on diffusers' UNet and scheduler."""
    step = 0

    def hook(name, cross, q, k, v):
        level = 3 - int(name.split(".")[1]) if name.startswith("up") else None
        looks = not cross and level is not None and level < finest and step >= first_step
        rows = []
        for row in range(len(q)):
            own = (row - 1 if row % 2 else row) if looks else row  # rows: source, target, source, target
            rows.append(maps(q[row : row + 1], k[own : own + 1]) @ v[own : own + 1])
        return torch.cat(rows)

    net, ddim_of = peer(sd, hook).double(), scheduler(N)
    null, source, target = texts(sd)
    x = torch.cat([path[path.top]] * 2)
    for step, t in enumerate(ddim_of.timesteps):
        if path.pinned:
            x = torch.cat([path[path.top - step], x[1:]])
        with torch.no_grad():
            e_null, e_text = net(torch.cat([x, x]), t, torch.cat([null, null, source, target])).sample.chunk(2)
        x = ddim_of.step(e_null + scale * (e_text - e_null), t, x, eta=0.0).prev_sample
    return x[1:]


@pytest.mark.parametrize("invert", [ddim, direct])
@pytest.mark.parametrize("first_step, finest", [(2, 2), (0, 9), (1, 1)])
def test_it_is_the_attention_of_the_paper(loud, invert, first_step, finest):
    path = path_of(loud, invert, X0.double())
    _, source, target = texts(loud)
    ours = M.masactrl(loud.eps, path, target, source, first_step=first_step, finest=finest)
    theirs = by_maps(loud, path, first_step, finest)
    plain = M.masactrl(loud.eps, path, target, source, first_step=N)
    assert error(ours, theirs) < 1e-5 and error(plain, theirs) > 1e-4  # a bound that a plain run would not meet


# ---------------------------------------------------------------- its variants, in the open

SOURCE, TARGET, OBJECT = "a horse on grass", "a zebra on sand", ([2], [2])


def variant(sd, path, looks=("source", "source"), at=None, threshold=0.1, finest=2, first_step=2):
    """One row after another: which keys a row may see is a mask over all of source and target."""
    step, seen = 0, []

    def hook(name, cross, q, k, v):
        level = 3 - int(name.split(".")[1]) if name.startswith("up") else None
        A = maps(q, k)
        if at and cross and step >= first_step and q.shape[2] == 16 and not name.startswith("mid"):
            seen.append([A[row, :, :, words].mean(0).sum(-1) for row, words in zip((2, 3), at)])
        if cross or level is None or level >= finest or step < first_step:
            return A @ v
        rows, n = [], q.shape[2]
        for row in range(4):
            source, look = row - row % 2, looks[row // 2] if row % 2 else "own"
            both_k, both_v = torch.cat([k[source], k[row]], dim=1), torch.cat([v[source], v[row]], dim=1)
            may = torch.zeros(n, 2 * n, dtype=torch.bool)
            may[:, :n] = look in ("source", "union")
            may[:, n:] = look in ("own", "union")
            if at and look != "own":
                inside = []
                for role in (0, 1):
                    m = torch.stack([one[role] for one in seen]).mean(0)
                    m = ((m - m.min()) / (m.max() - m.min())).view(2, 8)
                    times = {32: 1, 64: 2, 256: 4}[n]  # 2 x 8 cells to those of this level
                    inside.append((m >= threshold).repeat_interleave(times, 0).repeat_interleave(times, 1).flatten())
                may &= inside[1][:, None] == torch.cat(inside)[None]
            logits = torch.einsum("hnd,hmd->hnm", q[row], both_k) / q.shape[-1] ** 0.5
            rows.append(torch.softmax(logits.masked_fill(~may, -torch.inf), dim=-1) @ both_v)
        return torch.stack(rows)

    net, ddim_of = peer(sd, hook).double(), scheduler(N)
    x, text = torch.cat([path[path.top]] * 2), sd.text(["", "", SOURCE, TARGET])
    for step, t in enumerate(ddim_of.timesteps):
        seen.clear()
        x = torch.cat([path[path.top - step], x[1:]])
        with torch.no_grad():
            e_null, e_text = net(torch.cat([x, x]), t, text).sample.chunk(2)
        x = ddim_of.step(e_null + 7.5 * (e_text - e_null), t, x, eta=0.0).prev_sample
    return x[1:]


def varied(sd, path, **options):
    words = [words_of(sd.tokenizer, one) for one in (SOURCE, TARGET)]
    texts = sd.text([TARGET]), sd.text([SOURCE])
    return M.masactrl(sd.eps, path, *texts, sd.coarsest, *words, first_step=2, **options)


@pytest.fixture(scope="module")
def wide(loud):
    """A held path of 8 x 32 cells: 2 x 8 at the coarsest level with text."""
    x0, null, source = latent(1, 4, 8, 32), loud.text([""]), loud.text([SOURCE])
    with torch.no_grad():
        return direct(loud.eps, x0, null, source, steps=N)


VARIANTS = {
    "union": ({"look": "union", "null_look": "union"}, {"looks": ("union", "union")}),
    "the text's half alone": ({"null_look": "own"}, {"looks": ("own", "source")}),
    "two ways": ({"look": "union", "null_look": "source"}, {"looks": ("source", "union")}),
    "by parts": ({"object_words": "horse, zebra", "object_threshold": 0.5}, {"at": OBJECT, "threshold": 0.5}),
    "union by parts": ({"object_words": "horse, zebra", "object_threshold": 0.5, "look": "union", "null_look": "own"},
                       {"at": OBJECT, "threshold": 0.5, "looks": ("own", "union")}),
}  # fmt: skip


@pytest.fixture(scope="module")
def truth(loud, wide):
    """Of a variant's name."""
    return once(lambda name: variant(loud, wide, **VARIANTS[name][1]))


@pytest.mark.parametrize("name", VARIANTS)
def test_its_variants_are_those_of_whole_maps(loud, wide, truth, name):
    ours, theirs = varied(loud, wide, **VARIANTS[name][0]), truth(name)
    assert error(ours, theirs) < 1e-5 and error(varied(loud, wide), theirs) > 1e-4


def test_a_part_of_nothing_looks_at_all(loud, wide):
    """Above the largest value of its map nothing is the object's but the largest cell; at 0 everything is."""
    assert error(varied(loud, wide, object_words="horse,zebra", object_threshold=0.0), varied(loud, wide)) < 1e-8
    assert varied(loud, wide, object_words="horse,zebra", object_threshold=1.0).isfinite().all()


def test_looking_at_oneself_is_the_plain_run(loud, wide):
    own = varied(loud, wide, look="own", null_look="own")
    assert error(own, replay(loud.eps, wide, loud.text([TARGET]))) < 1e-8


def test_parts_of_pictures_in_a_batch_are_as_alone(loud):
    x0, null, source = latent(2, 4, 8, 32), loud.text([""]), loud.text([SOURCE])
    options = {"object_words": "horse, zebra", "object_threshold": 0.5, "look": "union"}
    paths = [direct(loud.eps, one, null, source, steps=N) for one in (x0, x0[:1], x0[1:])]
    together, *alone = (varied(loud, path, **options) for path in paths)
    assert error(together, torch.cat(alone)) < 1e-8


@pytest.mark.parametrize("given, why", [
    ({"source": SOURCE}, r"object_words must name a word of the source, got 'zebra'; its words are a, horse, on"),
    ({"source": "a zebra", "target": "a cow"}, "must name a word of the target"), ({}, "its words are none"),
])  # fmt: skip
def test_objects_that_a_prompt_lacks(given, why):
    with pytest.raises(ValueError, match=why):
        R.plan("masactrl", **{"target": TARGET, "object_words": "zebra"} | given)


def test_objects_of_texts_too_long_to_have_words_are_refused():
    words = words_of(Tokenizer(), "a horse")
    for pair in ((None, words), (words, None)):
        with pytest.raises(ValueError, match="needs texts of one chunk of 75 tokens"):
            M.objects("horse", *pair)


@pytest.mark.parametrize("method", ["masactrl-union", "prox-masactrl", "negative-prompt+masactrl-union"])
def test_variants_by_name(model, picture, method):
    done = edited(model, picture, method, source=SOURCE, target=TARGET)
    plain = R.edit(model, picture, "masactrl", source=SOURCE, target=TARGET, steps=10, seed=0)
    assert done.evaluations == {"encode": 10, "decode": 40} and not torch.equal(done.latent, plain.latent)
    by_parts = edited(model, picture, method, source=SOURCE, target=TARGET, object_words="horse, zebra")
    assert by_parts.rows == done.rows


def test_no_map_of_self_attention_is_built(sd, picture, monkeypatch):
    built = []

    def weights(q, k, real=M.weights):
        built.append((q.shape[2], k.shape[2]))
        return real(q, k)

    monkeypatch.setattr(M, "weights", weights)
    R.edit(sd, picture, "masactrl", target=TARGET, steps=5, seed=0)
    assert built == []
    told = {"target": TARGET, "source": SOURCE, "object_words": "horse, zebra", "first_step": 0}
    R.edit(sd, picture, "masactrl-union", steps=5, seed=0, **told)
    assert {m for _, m in built} == {77} and {n for n, _ in built} == {6} and len(built) == 5 * 5


@pytest.mark.parametrize("invert", [ddim, direct])
@pytest.mark.parametrize("never", [{"first_step": N}, {"first_step": 0, "finest": 0}])
def test_where_it_never_looks_it_is_the_plain_run(model, invert, never):
    path = path_of(model, invert)
    _, source, target = texts(model)
    ours = M.masactrl(model.eps, path, target, source, **never)
    torch.testing.assert_close(ours, replay(model.eps, path, target), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(ours, M.masactrl(model.eps, path, target, source, **EVERY), rtol=1e-2)


def test_on_a_held_path_the_sources_row_is_the_path_bit_for_bit(model):
    path, eps = path_of(model, direct), Rows(model)
    _, source, target = texts(model)
    M.masactrl(eps, path, target, source, **EVERY)
    assert [t for _, t, _ in eps.seen] == [path.t[j] for j in path.down()]
    assert all(torch.equal(x[:1], path[j]) for (x, _, _), j in zip(eps.seen, path.down(), strict=True))


def test_on_a_free_path_the_sources_row_is_a_run_of_its_own(loud):
    """It looks at itself alone, so the target beside it changes nothing of it; that run need not end at x_0.
    In float64, as guidance multiplies a batch's rounding at each step.
    """
    path = path_of(loud, ddim, X0.double())
    _, source, target = texts(loud)
    ends = []
    for beside in (target, source):
        eps = Rows(loud)
        M.masactrl(eps, path, beside, source, **EVERY)
        ends.append([x[:1] for x, _, _ in eps.seen])
    assert all(torch.equal(a, b) for a, b in zip(*ends))
    alone, solo = path.rows(1), [path.rows(1)]
    for j in path.down():
        e_null, e_text = loud.eps(alone, path.t[j], [path.null(j), source])
        alone = path.step(alone, e_null + 7.5 * (e_text - e_null), j)
        solo.append(alone)
    torch.testing.assert_close(torch.cat(ends[0]), torch.cat(solo[:-1]), rtol=1e-9, atol=1e-9)


def test_under_the_sources_own_text_the_edit_is_the_source(loud):
    """Both rows ask the same: nothing can come of looking elsewhere."""
    path = path_of(loud, ddim, X0.double())
    _, source, _ = texts(loud)
    ours = M.masactrl(loud.eps, path, source, source, **EVERY)
    torch.testing.assert_close(ours, replay(loud.eps, path, source), rtol=1e-9, atol=1e-9)


def test_each_half_looks_into_its_own_source_in_the_stated_layers(sd):
    """What a tap hands on: the source's keys and values for both roles, of the null text's half and of the text's."""
    path, seen = path_of(sd, direct), []
    _, source, target = texts(sd)

    def eps(x, t, texts, *, tap=None):
        def kept(plain, site, q, k, v):
            def noted(site, q2, k2, v2):
                seen.append((site, (q, k, v), (q2, k2, v2)))
                return plain(site, q2, k2, v2)

            return tap(noted, site, q, k, v) if tap else plain(site, q, k, v)

        return sd.eps(x, t, texts, tap=kept)

    M.masactrl(eps, path, target, source, first_step=N - 1, finest=2)
    changed = set()
    for site, before, after in seen:
        assert torch.equal(before[0], after[0])  # queries stay
        if torch.equal(before[1], after[1]) and torch.equal(before[2], after[2]):
            continue
        changed.add(site)
        for own, handed in zip(before[1:], after[1:]):
            assert torch.equal(handed, own[[0, 0, 2, 2]])
    assert changed == {Site("up", level, index, "self") for level in (0, 1) for index in range(3)}


def test_pictures_in_a_batch_are_as_alone(model):
    x0 = latent(3, 4, 8, 8, dtype=torch.float32)
    _, source, target = texts(model)
    for invert in (ddim, direct):
        together = M.masactrl(model.eps, path_of(model, invert, x0), target, source, **EVERY)
        for i in range(3):
            alone = M.masactrl(model.eps, path_of(model, invert, x0[i : i + 1]), target, source, **EVERY)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_by_name(sd, picture):
    done = R.edit(sd, picture, "masactrl", target="a zebra", source="a horse", steps=N, seed=0)
    assert done.evaluations == {"encode": 5, "decode": 20} and done.mask is None and done.trajectory.pinned
    _, source, target = texts(sd)
    assert torch.equal(done.latent, M.masactrl(sd.eps, path_of(sd, direct, done.x0), target, source))
    bare = R.edit(sd, picture, "masactrl", target="a zebra", steps=N, seed=0)
    assert bare.settings["source"] == "" and not torch.equal(bare.latent, done.latent)
    half = R.edit(sd, picture, "masactrl", target="a zebra", source="a horse", steps=N, strength=0.5, seed=0)
    assert half.evaluations == {"encode": 3, "decode": 12}


TWO_WAYS, PARTS = (partial(test_its_variants_are_those_of_whole_maps, name=name) for name in ("two ways", "by parts"))
# name: (what stands in methods/masactrl.py, what a mistake would put, the test that must fail)
MUTATIONS = {
    "the target's values": ("for y in (k, v)", "for y in (k, k)",
        test_each_half_looks_into_its_own_source_in_the_stated_layers),
    "one half looks into the other": ("(-1, 2, b))[:, [0, 0]]", "(2, -1, b))[[0, 0]]",
        test_each_half_looks_into_its_own_source_in_the_stated_layers),
    "the source looks into the target": ("[:, [0, 0]]", "[:, [1, 1]]",
        test_each_half_looks_into_its_own_source_in_the_stated_layers),
    "the encoder looks, too": ('or site.place != "up"', "",
        test_each_half_looks_into_its_own_source_in_the_stated_layers),
    "the text's attention, too": ('site.kind != "self" or', "",
        test_each_half_looks_into_its_own_source_in_the_stated_layers),
    "a level too many": ("site.level >= finest", "site.level > finest",
        test_each_half_looks_into_its_own_source_in_the_stated_layers),
    "a step too late": ("i >= first_step", "i > first_step",
        test_each_half_looks_into_its_own_source_in_the_stated_layers),
    "pictures change places": ("(-1, 2, b)", "(-1, b, 2)", test_pictures_in_a_batch_are_as_alone),
    "the source is not held": ("x = path.pin(x, j)", "pass",
        test_on_a_held_path_the_sources_row_is_the_path_bit_for_bit),
    "the source is the result": ("return x[b:]", "return x[:b]", test_where_it_never_looks_it_is_the_plain_run),
    "halves change places": ("enumerate((null_look, look))", "enumerate((look, null_look))", TWO_WAYS),
    "parts change places": ("torch.where(own[:, None], inner, outer)", "torch.where(own[:, None], outer, inner)",
        PARTS),
    "the source's cells for the edit's": ("enumerate(inside[1])", "enumerate(inside[0])", PARTS),
    "maps of an earlier step": ("seen.clear()", "pass", PARTS),
    "the texts change places": ("path.texts(source, target)", "path.texts(target, source)",
        test_where_it_never_looks_it_is_the_plain_run),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, model, loud, wide, truth, monkeypatch):
    old, new, test = MUTATIONS[name]
    place = f"methods.masactrl:{'mixed' if 'inside' in old or 'own[' in old else 'masactrl'}"
    monkeypatch.setattr(sys.modules[__name__], "M", mutant(place, old, new, monkeypatch))
    with pytest.raises((AssertionError, RuntimeError, IndexError)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(test, sd=sd, model=model, loud=loud, wide=wide, truth=truth)
