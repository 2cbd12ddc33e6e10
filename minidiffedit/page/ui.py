"""The page itself: controls from signatures, and what happens when they are used. Gradio serves it from this machine.

Every handler is a generator of {name of a component: update}; what it raises is said as a sentence in the page.
"""

import gc
import inspect
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..cost import counted_rows
from ..files import images
from ..files.hub import find_mini
from ..files.masks import Steering
from ..methods.table import INVERSIONS, MASKS, SYSTEMS
from ..options import Option, options_of
from ..run import COMMON, GIVEN, Plan, Result, blank_plan, execute, execute_mask, execute_path, function_at, inputs_of
from ..run import plan_words as words_of_a_text
from ..views.report import CUT, SHAPING, part
from ..views.sheet import candidates, plan_all
from ..views.witness import Witness
from ..views.word_page import chosen, word_page
from . import visit as visits
from .runs import Choice, Ended, NeedsModel, Seen, Stopped, Studio, Work
from .visit import Visit

FIRST = ("seed", "steps", "strength", "guidance_scale")  # options that are shown at once
MOST_VISITS, LARGEST = 32, "64mb"  # remembered at once; the upload of one picture
MOST_SESSIONS = 4  # whose parts Gradio holds: at each event it keeps some of them once more
UPLOAD: dict[str, Any] = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
MASK = "Where the picture may change. Paint finds it by itself; here it is seen and altered. Orange adds, blue removes."
WELCOME = "Choose an example or a picture, say what it shall show, and paint. All of it runs on this machine."
NOT_HERE = "This file is not here. If the server was started anew, load the page again."
FIND_ANEW = "These options ask for another mask: find it anew, or paint, which finds it first."
# What Gradio's own page would ask other machines for.
OTHERS = rb'<link\s+rel="preconnect"[^>]*>|<script\s+src="https?:[^>]*>\s*</script>'
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; base-uri 'self'; frame-ancestors 'none'"
ASKED_BY = (b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode")
BESIDE = "Before and after"
# What handlers answer with: no more than they need, as Gradio builds each part anew at each answer.
FOUND = ("status", "preview", "mask_said", "tinted", "heat", "regions", "sheet")
SHOWN = (*FOUND, "gallery", "slider", "made_said", "files", "command", "python")
ASKING = (*FOUND, "photo", "source", "target", "points", "places", "editor")
OUR_NAMES = rb"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?"  # of this machine


class Setup(NamedTuple):
    """What the command line names: models, another VAE ("": none), LoRAs, how a command and Python name a choice of
    them, a picture.
    """

    models: Sequence[str]
    vae: str
    loras: Sequence[str]
    named: Callable[[Choice], tuple[list[str], str]]
    photo: Path | None


class Page:
    """The page of one server. part: its components by name, those of options by what `kind_of` says of one."""

    def __init__(self, studio: Studio, setup: Setup, folder: Path):
        self.studio, self.setup, self.folder = studio, setup, folder
        self.visits, self.lock = dict[str, Visit](), threading.Lock()
        self.part, studio.forget = dict[Any, Any](), lambda: visits.let_go([*self.visits.values()], 0)
        kinds = {studio.sd.kind} if studio.sd and len(setup.models) == 1 else {one.weights for one in SYSTEMS.values()}
        rows = {name: one for name, one in SYSTEMS.items() if one.edit and one.weights in kinds}
        self.methods = [name for name, one in rows.items() if "x_T" not in inputs_of(one.edit)]
        self.options, self.blank, self.examples = all_options(self.methods), blank_plan(self.methods[0]), examples()
        self.seed = next(key for key in self.options if key[0] == "seed")

    def build(self) -> Any:
        import gradio as gr

        with gr.Blocks(title="minidiffedit", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            gr.HTML(f"<h1>minidiffedit</h1><p>{WELCOME}</p>")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self.build_asking(gr)
                with gr.Column(scale=3, min_width=320):
                    with gr.Column() as self.part["masking"]:
                        self.build_mask(gr)
                    self.build_edit(gr)
            with gr.Row(equal_height=True) as self.part["bar"]:  # at the window's lower edge, wherever the page stands
                self.part["status"] = gr.HTML(said(""), min_width=200)
                self.part["cancel"] = gr.Button("Cancel", scale=0, min_width=120)  # seen while something runs
            self.wire(gr, blocks)
        return blocks

    def build_options(self, gr: Any, keys: Iterable[Any]) -> None:
        for key in keys:
            self.part[key] = control(gr, self.options[key], self.blank)

    def build_given(self, gr: Any, *names: str) -> None:
        for name in names:
            (kind, meaning), shown = GIVEN[name], name in self.blank.given
            if kind in ("mask", "picture"):
                self.part[name] = gr.Image(label=spoken(meaning), height=160, visible=shown, **UPLOAD)
            else:
                info = f"{meaning}{': A=>B; C=>D' * (kind == 'pairs')}"
                self.part[name] = gr.Textbox(label=spoken(name), info=info, visible=shown, max_lines=4)

    def build_asking(self, gr: Any) -> None:
        put, blank, setup = self.part, self.blank, self.setup
        photo = shutil.copy(setup.photo, self.folder) if setup.photo else None
        put["photo"] = gr.Image(photo, label="Picture", height=320, **UPLOAD)
        shown = [(str(file), name) for name, (file, *_) in self.examples.items()]
        put["example"] = gallery(gr, "Examples, made for the miniature", value=shown, allow_preview=False)
        put["method"] = gr.Dropdown(self.methods, value=self.methods[0], label="Method")
        put["about"] = gr.HTML(about(self.methods[0]))
        self.build_given(gr, *(name for name in GIVEN if name not in ("negative_prompt", "mask")))
        put["places"] = seen(gr, "Click a place, then where it goes", visible=False, buttons=["fullscreen"])
        put["back"] = gr.Button("Undo the last place", visible=False)
        self.build_options(gr, sorted((k for k in self.options if k[0] in FIRST), key=lambda k: FIRST.index(k[0])))
        with gr.Accordion("More options", open=False):
            self.build_given(gr, "negative_prompt")
            put["inversion"] = gr.Dropdown([("its own", ""), *INVERSIONS], value="", label="Inversion")
            info = f"{', '.join(MASKS)}; or words:horse"
            put["mask_from"] = gr.Textbox("", label="Mask from", info=info, visible=blank.steerable)
            self.build_options(gr, (key for key in self.options if key[0] not in (*FIRST, *CUT)))
            models, vae, loras = setup.models, setup.vae, setup.loras
            put["model"] = gr.Dropdown([*models], value=models[0], label="Model", visible=len(models) > 1)
            put["vae"] = gr.Dropdown([("its own", ""), vae], value=vae, label="VAE", visible=bool(vae))
            put["lora"] = gr.CheckboxGroup([*loras], value=[*loras], label="LoRA", visible=bool(loras))
        put["settings"] = gr.File(label="Open a result to take its settings", file_types=["image"], height=150)

    def build_mask(self, gr: Any) -> None:
        put, steerable = self.part, self.blank.steerable
        gr.HTML(f"<h2>The mask</h2><p>{MASK}</p>")
        put["find"] = gr.Button("Find the mask", visible="mask" in self.blank.functions)
        put["mask_said"] = gr.HTML(said(""))
        with gr.Column() as put["panels"]:
            with gr.Row():
                with gr.Column(scale=2, min_width=300) as put["painting"]:
                    brush = gr.Brush(default_size="auto", colors=["#ff5814", "#1450ff"], color_mode="fixed")
                    options: dict[str, Any] = {"type": "pil", "sources": [], "transforms": [], "layers": False}
                    put["editor"] = gr.ImageEditor(**options, brush=brush, label="Brush", height=420)
                with gr.Column(min_width=200):
                    put["tinted"], put["heat"] = (seen(gr, one, height=200) for one in ("The mask", "Heat map"))
            put["regions"] = gallery(gr, "Each edit's own part", visible=False)
            with gr.Row():
                self.build_options(gr, (key for key in self.options if key[0] in CUT))
            with gr.Column(visible=steerable) as put["shaping"]:
                with gr.Row():
                    about = "cells by which it fades out"
                    put["dilate"] = gr.Slider(-4, 8, 0, step=1, label="Dilate", info="cells; below 0 it shrinks")
                    put["feather"] = gr.Slider(0, 8, 0, step=1, label="Feather", info=about)
                with gr.Row():
                    put["largest"] = gr.Checkbox(False, label="Largest piece only")
                    put["invert"] = gr.Checkbox(False, label="Invert")
        self.build_given(gr, "mask")

    def build_edit(self, gr: Any) -> None:
        put, blank = self.part, self.blank
        gr.HTML("<h2>The edit</h2>")
        with gr.Row():
            about = "how many pictures, each under a seed of its own"
            put["count"] = gr.Number(1, precision=0, minimum=1, maximum=16, label="Candidates", info=about)
            about = "other methods, under the same settings, to compare"
            put["others"] = gr.Dropdown(self.methods, value=[], multiselect=True, label="Also by", info=about)
        put["paint"] = gr.Button("Paint", variant="primary")
        put["preview"] = seen(gr, "What it is heading for", height=200, visible=False)
        with gr.Column() as put["results"]:
            put["slider"] = gr.ImageSlider(label=BESIDE, interactive=False, max_height=560)
            put["made_said"] = gr.HTML(said(""))
            put["gallery"] = gallery(gr, "Results: choose one to go on from", allow_preview=False)
            with gr.Row():
                put["again"] = gr.Button("Take its settings")
                put["next"] = gr.Button("Edit this result")
                put["whole"] = gr.Button("Add state and report")
            put["files"] = gr.File(label="Files", file_count="multiple", interactive=False)
            with gr.Accordion("The same from the command line, and in Python", open=False):
                text = {"interactive": False, "buttons": ["copy"], "lines": 2, "max_lines": 20}
                put["command"] = gr.Textbox("", label="Command, beside the files", **text)
                put["python"] = gr.Textbox("", label="Python, beside the files", **text)
        about = "Where the model looks for each word"
        with gr.Accordion(about, open=False, visible="source" in blank.given) as put["looks"]:
            put["words"] = gr.Button("Draw the word maps")
            put["sheet"] = seen(gr, "Word maps", show_label=False, visible=False)

    def wire(self, gr: Any, blocks: Any) -> None:
        """Which event calls which handler. Runs wait for one another in one queue, all else answers at once."""
        put, self.update = self.part, gr.update
        for key, one in put.items():
            one.elem_id = f"part-{key}" if isinstance(key, str) else f"option-{key[0]}-{key[1]}"
        mute = (gr.HTML, gr.Button, gr.Row, gr.Column, gr.Accordion)
        told = [one for one in put.values() if not isinstance(one, mute) and one.interactive is not False]
        anything = {"concurrency_limit": None, "show_progress": "hidden", "trigger_mode": "always_last"}
        a_run: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal"}
        a_run["show_progress_on"] = put["status"]

        def on(handler: Any, *triggers: Any, shows: Iterable[Any] = put, how: Any = anything, **more: Any) -> Any:
            def call(data: dict[Any, Any], request: gr.Request, event: gr.EventData) -> Iterator[Any]:
                yield from self.spoken(handler, self.visit(request), data, event)

            painting = how is a_run or triggers == (put["editor"].change,)
            sent = {one for one in told if painting or one is not put["editor"]}
            return gr.on([*triggers], call, sent, [put[key] for key in shows], api_visibility="private", **how, **more)

        on(self.take_photo, put["photo"].change, blocks.load, shows=ASKING)
        on(self.take_example, put["example"].select, shows=ASKING)
        on(self.take_method, put["method"].input, put["inversion"].input, put["mask_from"].submit)
        on(lambda visit, told: self.settings(visit, Path(told["settings"])), put["settings"].upload)
        on(self.take_place, put["places"].select, put["back"].click, shows=ASKING)
        on(self.show_places, put["points"].change, shows=ASKING)
        texts = [put[name].blur for name, one in GIVEN.items() if one.kind in ("text", "pairs")]
        on(self.look, put["mask"].change, *texts, *(put[key].input for key in (*SHAPING, *self.options)), shows=FOUND)
        on(self.look, put["editor"].change, shows=FOUND)
        made = (*SHOWN, self.seed)
        begun = [on(getattr(self, name), put[name].click, shows=made, how=a_run) for name in ("find", "paint", "words")]
        on(self.cancel, put["cancel"].click, shows=SHOWN, cancels=begun)
        on(self.choose, put["gallery"].select, shows=SHOWN)
        on(lambda visit, _: self.settings(visit, visit.result.picture), put["again"].click)
        on(self.next, put["next"].click, shows=ASKING)
        on(self.whole, put["whole"].click, shows=SHOWN)

        def gone(request: gr.Request) -> None:
            self.leave(request.session_hash)

        blocks.unload(gone)

    def visit(self, request: Any) -> Visit:
        """Whose request it is. Those who were here longest ago are forgotten first."""
        key = str(request.session_hash)
        with self.lock:  # a visitor's events come in several threads
            one = self.visits[key] = self.visits.pop(key) if key in self.visits else Visit(self.folder)
            for old in [*self.visits][:-MOST_VISITS]:
                self.leave(old)
        return one

    def leave(self, key: str | None) -> None:
        """A visitor is gone: the run stops, the files go."""
        if one := self.visits.pop(str(key), None):
            one.stop.set()
            shutil.rmtree(one.folder, ignore_errors=True)

    def spoken(self, handler: Callable[..., Iterator[Any]], visit: Visit, data: Any, event: Any) -> Iterator[Any]:
        """What a handler yields, by component; an error as a sentence in the status line."""
        told: dict[Any, Any] = {key: data[one] for key, one in self.part.items() if one in data}
        told["index"] = event._data.get("index") if isinstance(event._data, dict) else None  # of what was clicked

        def sent(updates: dict[Any, Any]) -> dict[Any, Any]:
            return {self.part[key]: one for key, one in updates.items()}

        yield sent({"status": self.update()})  # Gradio empties what is never answered
        try:
            yield from map(sent, handler(visit, told))
            return
        except Stopped:
            line = said("Cancelled.")
        except NeedsModel:
            line = said(FIND_ANEW, "alert")
        except Exception as error:
            line = said(escape(visits.sentence(error, self.folder)), "alert")
        yield sent({"status": line, **self.show(preview=False)})

    def asked(self, visit: Visit, told: dict[Any, Any]) -> tuple[Plan, dict[str, Path], Steering | None, Choice]:
        """The plan, its files, the steering with what is painted (None: neither), the model."""
        if visit.photo is None and told["photo"]:  # a visit that was forgotten
            visit.take(Path(told["photo"][0]), told["photo"][1])
        photo, picture = visit.at_hand
        choices = told["method"], told["inversion"] or None, told["mask_from"] or None
        blank = blank_plan(*choices)
        values = {name: one[0] if isinstance(one := told[name], tuple) else one for name in GIVEN}
        values |= {key[0]: told[key] for key in self.options if kind_of(blank.options.get(key[0])) == key}
        settled, files = visits.settle(choices, values, photo)
        if "editor" in told:  # else as it was when it was last painted on
            visit.layers = (told["editor"] or {}).get("layers") or []
        steering = Steering(**{name: told[name] for name in SHAPING} | visits.strokes(visit.layers, picture.size))
        return settled, files, steering if settled.steerable and steering.settings() else None, self.choice(told)

    def choice(self, told: dict[Any, Any]) -> Choice:
        one, setup = Choice(told["model"], told["vae"] or "", tuple(told["lora"] or ())), self.setup
        if one.model not in setup.models or one.vae not in ("", setup.vae) or {*one.loras} - {*setup.loras}:
            raise ValueError("the model, its VAE and its LoRAs are those that the command line named")
        return one

    def take_photo(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        photo = told["photo"]
        if photo and visit.drawn == Path(photo[0]):
            return
        visit.take(None)
        yield {"mask_said": said(""), "tinted": None, "heat": None, **self.show(regions=False)}
        if photo:
            visit.take(Path(photo[0]), photo[1])
            picture, visit.drawn = visits.reduced(visit.at_hand[1], visits.LONGEST), visit.photo
            yield {"editor": {"background": picture, "layers": [], "composite": None}}
            yield from self.show_places(visit, told)

    def take_example(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        file, source, target = [*self.examples.values()][told["index"]]
        yield {"photo": shutil.copy(file, visit.folder), "source": source, "target": target}

    def take_method(self, visit: Visit, told: dict[Any, Any], values: dict[str, Any] | None = None) -> Iterator[Any]:
        """Show what the method can be told, at its defaults, or as `values` say."""
        inversion = told["inversion"] if SYSTEMS[told["method"]].inversion else ""
        blank, values = blank_plan(told["method"], inversion or None, told["mask_from"] or None), values or {}
        made = dict[Any, Any]()
        for name in GIVEN:
            made[name] = self.update(visible=name in blank.given, **({"value": values[name]} if name in values else {}))
        for key in self.options:
            shown = kind_of(blank.options.get(key[0])) == key
            value = values.get(key[0], blank.settings.get(key[0]))
            made[key] = self.update(visible=shown, **({"value": boxed(blank.options[key[0]], value)} if shown else {}))
        made |= {name: values[name] for name in SHAPING if name in values}
        made["inversion"] = self.update(visible=bool(blank.system.inversion), value=inversion)
        drags, shaped = "points" in blank.given, blank.steerable
        made |= self.show(mask_from=shaped, shaping=shaped, places=drags, back=drags, regions=False)
        made |= self.show(find="mask" in blank.functions, looks="source" in blank.given)
        if not visit.found or visit.found.plan.functions.get("mask") != blank.functions.get("mask"):
            made |= {"mask_said": said(""), "tinted": None, "heat": None}  # another method's
        yield made | {"about": about(told["method"])}

    def show(self, **there: bool) -> dict[str, Any]:
        return {name: self.update(visible=one) for name, one in there.items()}

    def settings(self, visit: Visit, picture: Path) -> Iterator[Any]:
        (method, inversion, mask), values = visits.settings_of(picture)
        told = {"method": method, "inversion": inversion, "mask_from": mask}
        if method not in self.methods:
            raise ValueError(f"these settings are of {method}, which does not run on this model")
        for made in self.take_method(visit, told, values):
            yield made | {"method": method, "mask_from": self.update(value=mask), "status": said("Settings taken.")}

    def take_place(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        """A click into the picture is a place, then where it goes, and so on; a click elsewhere takes the last back."""
        places, index = visits.places_of(told["points"]), told["index"]
        places = [*places, visits.clicked(visit.at_hand[1], index)] if index else places[:-1]
        yield {"points": visits.points_of(places)}

    def show_places(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        if visit.picture:
            yield {"places": visits.arrows(visit.picture, visits.places_of(told["points"]))}

    def look(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        """The mask as the controls have it now, from what is known: no model row is paid."""
        try:
            settled, _, steering, choice = self.asked(visit, told)
            if (found := visit.mask(settled, steering, self.studio.held(choice))) is not None:
                yield self.masked(visit, found)
        except NeedsModel:
            yield {"mask_said": said(FIND_ANEW, "alert")}
        except ValueError:
            if visit.found is not None:  # else there is nothing to look at yet, nothing to complain about
                raise

    def masked(self, visit: Visit, found: Result | Tensor) -> dict[str, Any]:
        """What is shown of a mask, and of each edit's own where a result has several."""
        M, picture = found.latent_mask if isinstance(found, Result) else found, visit.at_hand[1]
        assert M is not None
        line, heat, each = visits.share_of(M), None, list[Any]()
        if isinstance(found, Result):
            line = "The two texts do not differ on this picture" if found.verdict == "no difference" else line
            line += f". UNet rows paid for it: {found.evaluations.get('mask', 0)}"
            heat = None if found.heat is None else visits.heat_picture(found.heat, picture.size)
            each = visits.own_parts(found)
        shown = {"heat": heat, "mask_said": said(f"{line}."), "tinted": visits.tinted(picture, M)}
        return shown | {"regions": self.update(value=each, visible=bool(each))}

    def find(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        settled, _, steering, choice = self.asked(visit, told)
        (photo, picture), size = visit.at_hand, settled.settings["size"]
        if settled.given.get("mask") is not None:
            raise ValueError("this edit has a mask of its own already; take it out to find another")

        def work(sd: Any, watch: Any) -> Result:
            known = visit.known(sd, size)
            watch.expect([settled], known, "mask")
            return execute_mask(settled, sd, photo, steering=steering, reuse=known, watch=watch, bitwise=True)

        for one in self.running(visit, choice, work):
            if isinstance(one, Ended):
                visit.found = replace(one.made, source=picture, image=picture)  # once in memory
                one = self.masked(visit, one.made) | {self.seed: str(one.made.seed), "status": said(noted(one))}
            yield one

    def paint(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        """The edit under the mask as it is shown; a painted one becomes a file, so that a command can name it."""
        settled, files, steering, choice = self.asked(visit, told)
        if visits.painted(steering):
            try:
                M = visit.mask(settled, steering, self.studio.held(choice))
            except NeedsModel:
                yield from self.find(visit, told)
                told[self.seed] = str(visit.found.seed) if visit.found else None
                settled, files, steering, choice = self.asked(visit, told)
                M = visit.mask(settled, steering, self.studio.held(choice))
            M = M.latent_mask if isinstance(M, Result) else M
            assert M is not None  # painted
            files["mask"], steering = visit.mask_file(M), None
            settled = replace(settled, given=settled.given | {"mask": images.read_picture(files["mask"])})
        (photo, picture), size, made = visit.at_hand, settled.settings["size"], list[visits.Made]()
        plans = planned(settled, int(told["count"] or 1), told["others"] or [])

        def work(sd: Any, watch: Any) -> Result | None:
            known, done = visit.known(sd, size), None
            watch.expect(plans, known)
            watch.sees(sd, picture, size, known)
            for one in plans:
                shaping = steering if one.steerable else None
                done = execute(one, sd, photo, steering=shaping, reuse=known, watch=watch, bitwise=True)
                known = [*known, done][-visits.MOST_REUSED :]
                watch.show(done)
            return done

        for one in self.running(visit, choice, work):
            if isinstance(one, Result):
                about = f"{one.method}, seed {one.seed}: {cost_of(one)}"
                made.append(visit.keep(one, files, self.setup.named(choice), about))
                visits.let_go([*self.visits.values()], visits.MOST_KEPT)
                found = self.masked(visit, one) if one.latent_mask is not None else {}
                found |= {"gallery": [(str(each.picture), each.about) for each in visit.made]}
                one = found | self.shown(visit, made[-1]) | {self.seed: str(settled.settings["seed"])}
            elif isinstance(one, Ended):
                label = f"Left by {plans[0].method}, right by {plans[-1].method}"
                sides = self.beside(made[0].picture, made[-1].picture, label) if told["others"] else {}
                one = sides | {"status": said(noted(one))}
            yield one

    def running(self, visit: Visit, choice: Choice, work: Work) -> Iterator[Any]:
        """A run's looks as updates, whatever else it shows as it comes."""
        visit.stop.set()
        visit.stop, photo = (stop := threading.Event()), visit.photo
        yield {"status": said('<progress aria-label="waiting"></progress> Waiting for the model.')}
        for one in self.studio.run(stop, choice, work):
            if visit.photo != photo:  # another picture was chosen meanwhile
                raise Stopped
            if isinstance(one, Seen):
                picture = {"preview": self.update(value=one.picture, visible=True)} if one.picture else {}
                yield picture | {"status": bar(one)}
            else:
                yield self.show(preview=False)
                yield one

    def cancel(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        visit.stop.set()
        raise Stopped

    def beside(self, left: Path, right: Path, label: str) -> dict[str, Any]:
        return {"slider": self.update(value=(str(left), str(right)) if left.exists() else None, label=label)}

    def shown(self, visit: Visit, made: visits.Made) -> dict[str, Any]:
        visit.shown = made
        texts = {"command": made.command, "python": made.python, "made_said": said(escape(made.about))}
        return texts | {"files": [*map(str, made.files)]} | self.beside(made.before, made.picture, BESIDE)

    def choose(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        yield self.shown(visit, visit.made[told["index"]])

    def next(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        yield {"photo": str(visit.result.picture), "status": said("This result is the picture now.")}

    def whole(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        yield {"files": [*map(str, visit.whole().files)], "status": said("State and report are among the files.")}

    def words(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        photo, _ = visit.at_hand
        if not told["source"]:
            raise ValueError("say in the source what the picture shows: its words are looked for")
        settled, seen, shown = words_of_a_text(told["source"]), Witness(), chosen(told["source"], None)

        def work(sd: Any, watch: Any) -> Image.Image:
            watch.expect([settled], [], "encode")
            return word_page(execute_path(settled, sd, photo, watch=watch, witness=seen), seen.looks[0], shown)

        for one in self.running(visit, self.choice(told), work):
            if isinstance(one, Ended):
                one = {"sheet": self.update(value=one.made, visible=True), "status": said(noted(one))}
            yield one


# ---------------------------------------------------------------- controls and words


def kind_of(one: Option | None) -> Any:
    """By what an option's control is known: methods may have options of one name and several kinds."""
    return None if one is None else (one.name, one.type.__name__, one.choices)


def all_options(methods: Sequence[str]) -> dict[Any, Option]:
    """Every option of these methods, of any inversion and any mask, the common ones first."""
    found = {kind_of(one): one for one in COMMON.values()}
    for place in dict.fromkeys([*(SYSTEMS[name].edit for name in methods), *INVERSIONS.values(), *MASKS.values()]):
        found = {kind_of(one): one for one in options_of(function_at(place)).values()} | found
    return found


def control(gr: Any, one: Option, blank: Any) -> Any:
    """The control of an option, shown where a blank plan has it."""
    shown = kind_of(blank.options.get(one.name)) == kind_of(one)
    value = boxed(one, blank.settings[one.name] if shown else one.default)
    common = {"value": value, "label": spoken(one.name), "info": one.about, "visible": shown}
    if one.type is bool:
        return gr.Checkbox(**common)
    if one.choices:
        return gr.Dropdown([*one.choices, *(["none"] if one.none else [])], **common)
    if one.type is float and not one.none and (one.low, one.high) == (0, 1):
        return gr.Slider(0, 1, step=0.01, min_width=200, **common)
    if one.numeric and not one.none:
        return gr.Number(**common, precision=0 if one.type is int else None)
    empty = "; empty: another one" if one.name == "seed" else "; empty: none" if one.none else ""
    return gr.Textbox(**common | {"info": one.about + empty})


def seen(gr: Any, label: str, **more: Any) -> Any:
    return gr.Image(label=label, interactive=False, format="png", **{"buttons": ["download", "fullscreen"]} | more)


def gallery(gr: Any, label: str, **more: Any) -> Any:
    looks = {"columns": 4, "height": "auto", "object_fit": "contain", "buttons": ["download", "fullscreen"]}
    return gr.Gallery(label=label, interactive=False, **looks | more)


def planned(settled: Plan, count: int, others: Sequence[str]) -> list[Plan]:
    """The plan and the same by other methods, so far as each takes what is said; each under as many seeds."""
    usual, plans = blank_plan(settled.method).settings, [settled]
    if others:
        known = {name: one for name, one in settled.given.items() if one not in (None, "")}
        known |= {name: one for name, one in settled.settings.items() if name == "seed" or one != usual.get(name)}
        plans += plan_all([{"method": name} | known for name in dict.fromkeys((settled.method, *others))])[1:]
    return plans if count == 1 else [one for each in plans for one in candidates(each, count)]


def boxed(one: Option, value: Any) -> Any:
    """A value as its control shows it; a number that may be none stands in a box of text."""
    if value is None:
        return "none" if one.choices else ""
    return str(value) if one.numeric and one.none else value


def trusting_nothing(gr: Any) -> None:
    """Gradio as this process has it: values and files come as they were sent, for the library to check and to read; an
    address in a file's place is not fetched.
    """
    take = gr.Image.async_move_resource_to_block_cache

    async def take_file(self: Any, path: Any) -> Any:
        if "://" in str(path):
            raise ValueError("an address is not fetched: send the file")
        return await take(self, path)

    gr.blocks.Block.async_move_resource_to_block_cache = take_file
    gr.processing_utils.InvalidPathError = lambda _: gr.Error(NOT_HERE, print_exception=False)
    gr.Image.preprocess = uploaded
    strokes = gr.utils.LRUCache(MOST_VISITS)  # in one place whichever editor is asked: Gradio builds it anew at times
    gr.ImageEditor.blob_storage = property(lambda _: strokes, lambda *_: None)
    # Values go whole: of a value's changed parts the browser would make the next one in place, and lose the one before.
    gr.utils.diff = lambda _, new: [["replace", [], new]]
    for kind in (gr.Slider, gr.Number, gr.Dropdown, gr.CheckboxGroup, gr.Checkbox, gr.Textbox):
        kind.preprocess = lambda _, value: value
    Image.init()  # Gradio opens pictures with whatever Pillow has: here with what the library reads
    Image.ID[:] = [kind for kind in Image.ID if kind in (*images.READ, "MPO")]


def uploaded(_: Any, payload: Any) -> tuple[str, str] | None:
    """The file that a visitor sent, where the server put it, and the name that it came with."""
    if payload is None:
        return None
    if not payload.path or not os.path.isfile(payload.path):
        raise ValueError("a picture must come as a file")
    return payload.path, Path(payload.orig_name or payload.path).name


def examples() -> dict[str, tuple[Path, str, str]]:
    """Scenes that the miniature was made for, as far as they are here: name -> picture, source, target."""
    scenes = find_mini() / "scenes"
    listed = json.loads((scenes / "scenes.json").read_text(encoding="utf-8"))
    there = [(one, file) for one in listed if (file := scenes / one["folder"] / "source.png").exists()]
    return {one["folder"].replace("-", " to ", 1): (file, one["source"], one["target"]) for one, file in there[:6]}


def spoken(name: str) -> str:
    return name[:1].upper() + name[1:].replace("_", " ")


def said(text: str, role: str = "status") -> str:
    """A line of the page that is read out when it changes."""
    return f'<p role="{role}" class="said {role}">{text}</p>'


def about(method: str) -> str:
    """Its paper, what it does, needs and costs; by its class the page's style hides what it has no use for."""
    system, blank = SYSTEMS[method], blank_plan(method)
    doc = str(inspect.getdoc(inspect.getmodule(function_at(system.edit))))
    first = re.split(r"(?<=\.)\s|\n\n", doc)[0].replace("\n", " ")
    paper = "" if system.paper in first else f"{system.paper}: "
    note = f" {spoken(system.note)}." if system.note else ""
    costs = f"Needs {' and '.join(blank.needs) or 'no text'}; {counted_rows(method):,} UNet rows at the defaults."
    text = escape(f"{paper}{first}{note} {costs}".replace("`", ""))
    text = re.sub(r"\d{4}\.\d{5}", r'<a href="https://arxiv.org/abs/\g<0>" target="_blank">arXiv \g<0></a>', text)
    lacks = f"{'' if blank.masked else 'maskless'} {'' if blank.steerable else 'brushless'}"
    return said(f'<span class="{lacks}">{text}</span>', "note")


def bar(one: Seen) -> str:
    left = "" if one.left is None else f", {one.left:.0f} s left"
    meter = f'<progress max="{max(1, one.total)}" value="{one.done}" aria-label="model rows done"></progress>'
    return said(f"{meter} {escape(one.stage)}: {one.done} of {one.total} rows{left}")


def noted(one: Ended) -> str:
    """The end of a run: what it cost, what it warned of."""
    first = cost_of(one.made) if isinstance(one.made, Result) else "Done."
    return "<br>".join(escape(text) for text in (first, *one.warnings))


def cost_of(one: Result) -> str:
    rows = ", ".join(f"{stage} {n}" for stage, n in one.evaluations.items())
    return f"UNet rows {one.rows} ({rows}), {sum(one.seconds.values()):.1f} s"


# ---------------------------------------------------------------- the server


class Local:
    """Between Gradio and the browser: the page asks no other machine for anything, and may not; nor is anything done
    that another site's page asks for. here: whether the server is for this machine alone.
    """

    def __init__(self, app: Any, here: bool):
        self.app, self.here = app, here

    def asked_by_us(self, headers: dict[bytes, bytes]) -> bool:
        """By the page itself, under a name of this machine: no other name leads here, whatever it resolves to."""
        host, origin, site, mode = (headers.get(name, b"") for name in ASKED_BY)
        named = not self.here or re.fullmatch(OUR_NAMES, host)
        own = site in (b"", b"none", b"same-origin") or mode == b"navigate"  # a browser's word; a link may lead here
        return bool(named and own) and origin in (b"", b"http://" + host, b"https://" + host)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self.asked_by_us(dict(scope["headers"])):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"this page answers its own requests alone"})
        if scope["type"] != "http" or scope["path"] != "/":
            return await self.app(scope, receive, send)
        sent: list[Any] = []

        async def keep(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, keep)
        body = re.sub(OTHERS, b"", b"".join(one.get("body", b"") for one in sent))
        headers = [(name, value) for name, value in sent[0]["headers"] if name != b"content-length"]
        headers += [(b"content-length", str(len(body)).encode()), (b"content-security-policy", POLICY)]
        await send(sent[0] | {"headers": headers})
        await send({"type": "http.response.body", "body": body})


@contextmanager
def served(studio: Studio, setup: Setup, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """The page, served as long as the block lasts; its address. What visitors send stands in a folder of its own, gone
    at the end, and is opened by the library's decoders alone. port: None for any that is free.
    """
    with tempfile.TemporaryDirectory(prefix="minidiffedit-page-") as name:
        folder = Path(name).resolve()
        uploads = folder / "uploads"
        os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
        import gradio as gr
        from starlette.middleware import Middleware

        trusting_nothing(gr)
        gc.freeze()  # the program itself: Python sweeps what is left behind the sooner
        blocks = Page(studio, setup, folder).build().queue(max_size=20)
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        door = Middleware(Local, host in ("127.0.0.1", "localhost", "::1"))
        app = {"middleware": [door], "docs_url": None, "redoc_url": None}
        looks = {"theme": theme, "head": part("page.html"), "footer_links": [], "state_session_capacity": MOST_SESSIONS}
        limits = {"max_file_size": LARGEST, "strict_cors": True, "share": False, "ssr_mode": False, "quiet": True}
        here = {"server_name": host, "server_port": port, "prevent_thread_lock": True}
        _, url, _ = blocks.launch(app_kwargs=app, **looks, **limits, **here)
        try:
            yield url
        finally:
            blocks.close()
