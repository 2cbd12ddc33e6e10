"""The page itself: controls from signatures, and what happens when they are used. Gradio serves it from this machine.

Every handler is a generator of {component: update}; what it raises is said as a sentence in the page.
"""

import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..files import images
from ..files.hub import find_mini
from ..files.masks import Steering
from ..methods.table import INVERSIONS, MASKS, SYSTEMS
from ..options import Option, options_of
from ..run import COMMON, GIVEN, Result, blank_plan, execute, execute_mask, execute_path, function_at, inputs_of
from ..run import plan_words as words_of_a_text
from ..views.report import CUT, part
from ..views.sheet import candidates, draw_sheet, planned
from ..views.witness import Witness
from ..views.word_page import chosen as chosen_words
from ..views.word_page import word_page
from . import visit as visits
from .runs import Ended, NeedsModel, Seen, Stopped, Studio
from .visit import SHAPING, Visit

Choice = tuple[str, tuple[str, ...]]
FIRST = ("seed", "steps", "strength", "guidance_scale")  # options that are shown at once
SHOWN = ["download", "fullscreen"]  # of a picture: no button that shares it
MOST_VISITS, LARGEST = 50, "64mb"  # the upload of one picture
FIND_ANEW = "These options ask for another mask: find it anew."
COLOURS = {  # with enough contrast, in light and dark
    "button_primary_background_fill": "#b3431a",
    "button_primary_background_fill_dark": "#b3431a",
    "button_primary_background_fill_hover": "#8f3412",
    "button_primary_background_fill_hover_dark": "#8f3412",
    "button_primary_text_color": "#fff",
    "button_cancel_background_fill": "#b00020",
    "button_cancel_text_color": "#fff",
    "block_info_text_color": "#57534e",
    "block_info_text_color_dark": "#c4beb4",
    "block_label_text_color": "#44403c",
    "block_title_text_color": "#292524",
    "body_text_color_subdued": "#57534e",
    "body_text_color_subdued_dark": "#c4beb4",
    "link_text_color_dark": "#93b4ff",
    "slider_color": "#b3431a",
}
# What Gradio's own page would ask other machines for.
OTHERS = rb'<link\s+rel="preconnect"[^>]*>|<script\s+src="https?:[^>]*>\s*</script>'
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


class Setup(NamedTuple):
    """What the command line names: models and LoRAs, how a command and Python name a choice of them, a picture."""

    models: Sequence[str]
    loras: Sequence[str]
    named: Callable[[Choice], tuple[list[str], str]]
    photo: Path | None


class Page:
    """The page of one server. Components are kept by the name of what they say."""

    def __init__(self, studio: Studio, setup: Setup, folder: Path):
        self.studio, self.setup, self.folder = studio, setup, folder
        self.visits: dict[str, Visit] = {}
        self.options: dict[Any, Any] = {}
        self.part: dict[str, Any] = {}  # every other component
        kinds = {studio.sd.kind} if studio.sd and len(setup.models) == 1 else {one.weights for one in SYSTEMS.values()}
        rows = {name: one for name, one in SYSTEMS.items() if one.edit and one.weights in kinds}
        self.methods = [name for name, one in rows.items() if "x_T" not in inputs_of(one.edit)]
        self.examples = examples()

    # ------------------------------------------------------------ what stands on it

    def build(self) -> Any:
        import gradio as gr

        with gr.Blocks(title="minidiffedit", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            gr.HTML("<h1>minidiffedit</h1><p>Edit a picture by text. All of it runs on this machine.</p>")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self.build_asking(gr)
                with gr.Column(scale=3, min_width=320):
                    self.build_mask(gr)
                    self.build_result(gr)
            self.wire(gr, blocks)
        return blocks

    def build_asking(self, gr: Any) -> None:
        put, sources, photo = self.part, ["upload", "clipboard"], self.setup.photo
        put["photo"] = gr.Image(
            shutil.copy(photo, self.folder) if photo else None,
            type="filepath",
            image_mode=None,
            sources=sources,
            label="Picture",
            height=320,
        )
        put["example"] = gr.Dropdown([*self.examples], value=None, label="Example", info="made for the miniature")
        put["method"] = gr.Dropdown(self.methods, value=self.methods[0], label="Method")
        put["about"] = gr.HTML(about(self.methods[0]))
        blank = blank_plan(self.methods[0])
        for name, (kind, said) in GIVEN.items():
            common: dict[str, Any] = {"label": spoken(name), "visible": name in blank.given}
            if kind in ("mask", "picture"):
                common |= {"type": "filepath", "image_mode": None, "sources": sources, "height": 160}
                put[name] = gr.Image(**common | {"label": f"{spoken(name)}: {said}"})
            else:
                info = said + (": A=>B; C=>D" if kind == "pairs" else "; click into the picture" * (kind == "points"))
                put[name] = gr.Textbox(**common, info=info, max_lines=4)
        found = all_options(self.methods)
        for key in sorted(found, key=lambda key: FIRST.index(key[0]) if key[0] in FIRST else 9):
            if key[0] in FIRST:
                self.options[key] = control(gr, found[key], blank)
        with gr.Accordion("More options", open=False):
            put["inversion"] = gr.Dropdown([("its own", ""), *INVERSIONS], value="", label="inversion")
            info = f"{', '.join(MASKS)}; or words:horse"
            put["mask_from"] = gr.Textbox("", label="mask from", info=info, visible=bool(blank.steerable))
            for key, one in found.items():
                if key[0] not in (*FIRST, *CUT):
                    self.options[key] = control(gr, one, blank)
            models, loras = self.setup.models, self.setup.loras
            put["model"] = gr.Dropdown([*models], value=models[0], label="model", visible=len(models) > 1)
            put["lora"] = gr.CheckboxGroup([*loras], value=[*loras], label="LoRA", visible=bool(loras))
        put["settings"] = gr.File(label="Take the settings of a result", file_types=["image"], height=110)

    def build_mask(self, gr: Any) -> None:
        put = self.part
        gr.HTML("<h2>1. The mask</h2>")
        put["find"] = gr.Button("Find the mask", variant="primary")
        put["mask_said"] = gr.HTML(said("Where the two texts disagree. Or paint your own."))
        with gr.Row():
            brush = gr.Brush(default_size="auto", colors=["#ff5814", "#1450ff"], color_mode="fixed")
            seen = {"interactive": False, "height": 200, "format": "png", "buttons": SHOWN}
            options: dict[str, Any] = {"type": "pil", "sources": [], "transforms": [], "layers": False}
            label = "Paint: orange adds, blue takes away"
            put["editor"] = gr.ImageEditor(**options, brush=brush, label=label, height=420)
            with gr.Column(min_width=200):
                put["tinted"] = gr.Image(label="The mask", **seen)
                put["heat"] = gr.Image(label="Heat map", **seen)
        blank, found = blank_plan(self.methods[0]), all_options(self.methods)
        with gr.Row():
            for key, one in found.items():
                if key[0] in CUT:
                    self.options[key] = control(gr, one, blank)
        with gr.Row():
            put["dilate"] = gr.Slider(
                -4, 8, 0, step=1, min_width=200, label="dilate", info="grow by cells; below 0 shrink"
            )
            put["feather"] = gr.Slider(0, 8, 0, step=1, min_width=200, label="feather", info="fade out over more cells")
            put["largest"] = gr.Checkbox(False, label="largest piece only")
            put["invert"] = gr.Checkbox(False, label="invert")

    def build_result(self, gr: Any) -> None:
        put = self.part
        gr.HTML("<h2>2. The edit</h2>")
        with gr.Row():
            put["count"] = gr.Number(1, precision=0, minimum=1, maximum=16, label="candidates", info="of one seed each")
            put["paint"] = gr.Button("Paint", variant="primary")
            put["cancel"] = gr.Button("Cancel", variant="stop")
        put["status"] = gr.HTML(said(""))
        put["preview"] = gr.Image(
            label="What it is heading for", interactive=False, height=200, visible=False, buttons=SHOWN
        )
        put["slider"] = gr.ImageSlider(label="Before and after", interactive=False, max_height=560)
        put["made_said"] = gr.HTML(said(""))
        put["gallery"] = gr.Gallery(
            label="Results: choose one to go on from", columns=4, height=220, interactive=False, buttons=SHOWN
        )
        with gr.Row():
            put["again"] = gr.Button("Take its settings")
            put["next"] = gr.Button("Edit this result")
            put["whole"] = gr.Button("Add state and report")
        put["files"] = gr.File(label="Files", file_count="multiple", interactive=False)
        with gr.Accordion("The same from the command line, and in Python", open=False):
            text = {"interactive": False, "buttons": ["copy"], "lines": 2, "max_lines": 20}
            put["command"] = gr.Textbox("", label="command, beside the files", **text)
            put["python"] = gr.Textbox("", label="Python, beside the files", **text)
        with gr.Accordion("Look closer", open=False):
            put["words"] = gr.Button("Where each word of the source is looked for")
            names = [*self.methods]
            put["others"] = gr.Dropdown(names, value=[], multiselect=True, label="Method against method")
            put["compare"] = gr.Button("Compare")
            put["sheet"] = gr.Image(label="Page", interactive=False, visible=False, format="png", buttons=SHOWN)

    # ------------------------------------------------------------ what happens

    def wire(self, gr: Any, blocks: Any) -> None:
        """Which event calls which handler. Runs wait for one another in one queue, all else answers at once."""
        put, self.update = self.part, gr.update
        for name, component in put.items():
            component.elem_id = f"part-{name}"
        for key, component in self.options.items():
            component.elem_id = f"option-{key[0]}-{key[1]}"
        inputs, outputs = {*put.values(), *self.options.values()}, [*put.values(), *self.options.values()]
        inputs -= {put[name] for name in ("about", "mask_said", "status", "made_said", "tinted", "heat", "preview")}
        inputs -= {put[name] for name in ("slider", "gallery", "files", "command", "python", "sheet")}
        inputs -= {one for one in inputs if isinstance(one, gr.Button)}

        def on(handler: Callable[..., Iterator[Any]], *triggers: Any, run: bool = False, **how: Any) -> Any:
            def call(data: dict[Any, Any], request: gr.Request) -> Iterator[Any]:
                yield from self.spoken(handler, self.visit(request), data)

            def call_with(data: dict[Any, Any], request: gr.Request, event: gr.SelectData) -> Iterator[Any]:
                yield from self.spoken(partial(handler, event=event), self.visit(request), data)

            if run:
                how |= {
                    "concurrency_limit": 1,
                    "concurrency_id": "model",
                    "show_progress": "minimal",
                    "show_progress_on": put["status"],
                }
            else:
                how |= {"concurrency_limit": None, "show_progress": "hidden", "trigger_mode": "always_last"}
            asked = inputs if run or triggers == (put["editor"].change,) else inputs - {put["editor"]}
            fn = call_with if "event" in inspect.signature(handler).parameters else call
            return gr.on([*triggers], fn, asked, outputs, api_visibility="private", **how)

        on(self.take_photo, put["photo"].change, blocks.load)
        on(self.take_example, put["example"].input)
        on(self.take_method, put["method"].input, put["inversion"].input, put["mask_from"].submit)
        on(self.take_settings, put["settings"].upload)
        on(self.take_point, put["photo"].select)
        live = [put[name].input for name in SHAPING] + [put["mask"].change]
        of_masks = {name for place in MASKS.values() for name in options_of(function_at(place))}
        on(self.look, *live, *(one.input for key, one in self.options.items() if key[0] in of_masks - {*FIRST}))
        names = ("find", "paint", "words", "compare")
        on(self.look, put["editor"].change)
        runs = [on(getattr(self, name), put[name].click, run=True) for name in names]
        on(self.cancel, put["cancel"].click, cancels=runs)
        on(self.choose, put["gallery"].select)
        on(self.again, put["again"].click)
        on(self.next, put["next"].click)
        on(self.whole, put["whole"].click)

        def gone(request: gr.Request) -> None:
            self.leave(request.session_hash)

        blocks.unload(gone)

    def visit(self, request: Any) -> Visit:
        key = str(request.session_hash)
        if key not in self.visits:
            for old in [*self.visits][: len(self.visits) - MOST_VISITS + 1]:
                self.leave(old)
            self.visits[key] = Visit(self.folder)
        return self.visits[key]

    def leave(self, key: str | None) -> None:
        """A visitor is gone: the run stops, the files go."""
        if one := self.visits.pop(str(key), None):
            one.stop.set()
            shutil.rmtree(one.folder, ignore_errors=True)

    def spoken(self, handler: Callable[..., Iterator[Any]], visit: Visit, data: dict[Any, Any]) -> Iterator[Any]:
        """What a handler yields, by component; an error as a sentence in the status line."""
        names = {component: name for name, component in self.part.items()}
        names |= {component: key for key, component in self.options.items()}
        told = {names[component]: value for component, value in data.items()}

        def hidden(text: str) -> str:
            photo = told.get("photo")
            text = text.replace(photo[0], photo[1]) if photo else text
            return text.replace(f"{self.folder}/", "").replace(str(self.folder), "")

        yield {self.part["status"]: self.update()}  # Gradio empties what is never answered
        try:
            for updates in handler(visit, told):
                yield {self.part[key] if key in self.part else self.options[key]: one for key, one in updates.items()}
        except Stopped:
            yield {self.part["status"]: said("Cancelled."), self.part["preview"]: self.update(visible=False)}
        except NeedsModel:
            yield {self.part["status"]: said(FIND_ANEW, "alert")}
        except Exception as error:
            line = said(escape(visits.sentence(error, hidden)), "alert")
            yield {self.part["status"]: line, self.part["preview"]: self.update(visible=False)}

    # ------------------------------------------------------------ handlers: what is asked for

    def asked(self, visit: Visit, told: dict[Any, Any]) -> tuple[Any, dict[str, Path], Steering, Choice]:
        """The plan, its files, the steering with what is painted, the model."""
        if visit.photo is None and told["photo"]:  # a visit that was forgotten
            visit.take(Path(told["photo"][0]), told["photo"][1])
        photo, picture = visit.at_hand
        choices = told["method"], told["inversion"] or "", told["mask_from"] or ""
        blank = blank_plan(choices[0], choices[1] or None, choices[2].partition(":")[0] or None)
        values = {name: one[0] if isinstance(one := told[name], tuple) else one for name in GIVEN}
        values |= {key[0]: told[key] for key in self.options if kind_of(blank.options.get(key[0])) == key}
        settled, files = visits.settle(choices, values, photo)
        if "editor" in told:  # else as it was when it was last painted on
            visit.layers = (told["editor"] or {}).get("layers") or []
        shaping = {
            name: bool(told[name]) if name in ("largest", "invert") else int(told[name] or 0) for name in SHAPING
        }
        steering = Steering(**shaping | visits.strokes(visit.layers, picture.size))  # type: ignore[arg-type]
        return settled, files, steering, (told["model"], tuple(told["lora"] or ()))

    def take_photo(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        photo = told["photo"]
        if photo and visit.photo == Path(photo[0]):
            return
        if visit.photo:
            visit.take(None)
            yield dict.fromkeys(("editor", "tinted", "heat")) | {"mask_said": said("")}
        if photo:
            visit.take(Path(photo[0]), photo[1])
            picture = visits.reduced(visit.at_hand[1], visits.LONGEST)
            yield {"editor": {"background": picture, "layers": [], "composite": None}, "status": said("")}

    def take_example(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        if told["example"]:
            file, source, target = self.examples[told["example"]]
            yield {"photo": shutil.copy(file, visit.folder), "source": source, "target": target}

    def take_method(self, visit: Visit, told: dict[Any, Any], values: dict[str, Any] | None = None) -> Iterator[Any]:
        """Show what the method can be told, at its defaults, or as `values` say."""
        inversion = told["inversion"] if SYSTEMS[told["method"]].inversion else ""
        blank = blank_plan(told["method"], inversion or None, (told["mask_from"] or "").partition(":")[0] or None)
        values, made = values or {}, dict[Any, Any]()
        for name in GIVEN:
            made[name] = self.update(visible=name in blank.given, **({"value": values[name]} if name in values else {}))
        for key in self.options:
            shown = kind_of(blank.options.get(key[0])) == key
            value = values.get(key[0], blank.settings.get(key[0]))
            made[key] = self.update(visible=shown, **({"value": boxed(blank.options[key[0]], value)} if shown else {}))
        made |= {name: values[name] for name in SHAPING if name in values}
        made |= {"about": about(told["method"]), "mask_from": self.update(visible=blank.steerable)}
        made["inversion"] = self.update(visible=bool(blank.system.inversion), value=inversion)
        yield made

    def take_settings(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        if told["settings"]:
            yield from self.settings(visit, visits.settings_of(Path(told["settings"])))

    def settings(self, visit: Visit, found: Any) -> Iterator[Any]:
        (method, inversion, mask), values = found
        told = {"method": method, "inversion": inversion, "mask_from": mask}
        if method not in self.methods:
            raise ValueError(f"these settings are of {method}, which does not run on this model")
        for made in self.take_method(visit, told, values):
            yield made | {"method": method, "mask_from": self.update(value=mask), "status": said("Settings taken.")}

    def take_point(self, visit: Visit, told: dict[Any, Any], event: Any) -> Iterator[Any]:
        """Clicks into the picture: a place, then where it goes, and so on."""
        if "points" in blank_plan(told["method"]).given and isinstance(event.index, list | tuple):
            x, y = event.index[:2]
            before = (told["points"] or "").strip()
            joint = "" if not before else "=>" if before.count("=>") <= before.count(";") else "; "
            yield {"points": f"{before}{joint}{x:g},{y:g}"}

    # ------------------------------------------------------------ handlers: the mask

    def look(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        """The mask as the controls have it now, from what is known: no model row is paid."""
        try:
            settled, _, steering, _ = self.asked(visit, told)
        except ValueError:
            if visit.found is None:  # nothing to look at yet, nothing to complain about
                return
            raise
        try:
            found = visit.mask(settled, steering, self.studio.sd)
        except NeedsModel:
            yield {"mask_said": said(FIND_ANEW, "alert")}
            return
        if found is not None:
            yield self.masked(visit, found)

    def masked(self, visit: Visit, found: Result | Tensor) -> dict[str, Any]:
        M = found.latent_mask if isinstance(found, Result) else found
        assert M is not None
        share = f"{float((M > 0).float().mean()):.1%} of the picture, {int((M > 0).sum())} of {M.numel()} cells."
        if isinstance(found, Result):
            share = "The two texts do not differ on this picture." if found.verdict == "no difference" else share
            share += f" UNet rows paid for it: {found.evaluations.get('mask', 0)}."
        heat = found.heat if isinstance(found, Result) else None
        picture = visit.at_hand[1]
        shown = None if heat is None else visits.heat_picture(heat, picture.size)
        return {"tinted": visits.tinted(picture, M), "heat": shown, "mask_said": said(share)}

    def find(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        settled, _, steering, choice = self.asked(visit, told)
        (photo, _), size = visit.at_hand, settled.settings["size"]
        if settled.given.get("mask") is not None:
            raise ValueError("this edit has a mask of its own already; take it out to find another")

        def work(sd: Any, watch: Any) -> Result:
            known = visit.known(sd, size)
            watch.expect([settled], known, "mask")
            return execute_mask(settled, sd, photo, steering=steering, reuse=known, watch=watch, bitwise=True)

        for one in self.running(visit, choice, work):
            if isinstance(one, Ended):
                visit.found = one.made
                yield self.masked(visit, one.made) | {self.seed: str(one.made.seed), "status": said(noted(one))}
            else:
                yield one

    # ------------------------------------------------------------ handlers: the edit

    def paint(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        """The edit under the mask as it is shown; a painted one becomes a file, so that a command can name it."""
        settled, files, steering, choice = self.asked(visit, told)
        (photo, picture), size, shaping = (
            visit.at_hand,
            settled.settings["size"],
            steering if steering.settings() else None,
        )
        if steering.union is not None or steering.subtract is not None:
            if not settled.steerable:
                raise ValueError(f"{settled.method} takes no painted mask: undo the strokes")
            M = visit.mask(settled, steering, self.studio.sd)
            M = M.latent_mask if isinstance(M, Result) else M
            assert M is not None  # painted
            files["mask"] = visit.mask_file(M)
            shaping, given = None, settled.given | {"mask": images.read_picture(files["mask"])}
            settled = replace(settled, given=given)
        count = int(told["count"] or 1)
        plans = candidates(settled, count) if count != 1 else [settled]

        def work(sd: Any, watch: Any) -> Result | None:
            known = visit.known(sd, size)
            watch.expect(plans, known)
            watch.sees(sd, picture, size, known)
            done = None
            for one in plans:
                done = execute(one, sd, photo, steering=shaping, reuse=known, watch=watch, bitwise=True)
                known = [*known, done][-visits.MOST_REUSED :]
                watch.show(done)
            return done

        for one in self.running(visit, choice, work):
            if isinstance(one, Result):
                made = visit.keep(one, files, self.setup.named(choice), about_result(one))
                found = self.masked(visit, one) if one.latent_mask is not None else {}
                yield found | self.shown(visit, made) | {self.seed: str(plans[0].settings["seed"])}
            else:
                yield {"status": said(noted(one))} if isinstance(one, Ended) else one

    def running(self, visit: Visit, choice: Choice, work: Callable[[Any, Any], Any]) -> Iterator[Any]:
        """A run's looks as updates, whatever else it shows as it comes."""
        if choice[0] not in self.setup.models or {*choice[1]} - {*self.setup.loras}:
            raise ValueError("the model and its LoRAs are those that the command line named")
        visit.stop.set()
        visit.stop = stop = type(visit.stop)()
        yield {"status": said("Waiting for the model.")}
        for one in self.studio.run(stop, choice, work):
            if isinstance(one, Seen):
                picture = {"preview": self.update(value=one.picture, visible=True)} if one.picture else {}
                yield picture | {"status": bar(one)}
            else:
                yield {"preview": self.update(value=None, visible=False)}
                yield one

    def cancel(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        visit.stop.set()
        yield {"status": said("Cancelled."), "preview": self.update(value=None, visible=False)}

    def shown(self, visit: Visit, made: visits.Made) -> dict[str, Any]:
        """A result, and all results beside it."""
        visit.shown = made
        gallery = [(str(one.picture), one.about) for one in visit.made]
        source = visit.folder / f"{made.picture.stem}-before.png"
        if not source.exists() and made.source.exists():
            images.write_picture(images.to_rgb(images.read_picture(made.source)), source)
        sides = (str(source), str(made.picture)) if source.exists() else None
        files = [str(one) for one in made.files]
        told = {"slider": sides, "gallery": gallery, "made_said": said(escape(made.about)), "files": files}
        return told | {"command": made.command, "python": made.python}

    def choose(self, visit: Visit, told: dict[Any, Any], event: Any) -> Iterator[Any]:
        if isinstance(event.index, int) and 0 <= event.index < len(visit.made):
            made = self.shown(visit, visit.made[event.index])
            yield {name: one for name, one in made.items() if name != "gallery"}

    def again(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        if visit.shown is None:
            raise ValueError("there is no result yet")
        yield from self.settings(visit, visits.settings_of(visit.shown.picture))

    def next(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        if visit.shown is None:
            raise ValueError("there is no result yet")
        yield {"photo": str(visit.shown.picture), "status": said("This result is the picture now.")}

    def whole(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        yield {
            "files": [str(one) for one in visit.whole().files],
            "status": said("State and report are among the files."),
        }

    # ------------------------------------------------------------ handlers: to look closer

    def words(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        photo, _ = visit.at_hand
        if not told["source"]:
            raise ValueError("say in the source what the picture shows: its words are looked for")
        settled, seen = words_of_a_text(told["source"], size=told.get("size")), Witness()
        shown = chosen_words(told["source"], None)

        def work(sd: Any, watch: Any) -> Image.Image:
            watch.expect([settled], [], "encode")
            return word_page(execute_path(settled, sd, photo, watch=watch, witness=seen), seen.looks[0], shown)

        yield from self.page_of(visit, told, work)

    def compare(self, visit: Visit, told: dict[Any, Any]) -> Iterator[Any]:
        settled, _, _, _ = self.asked(visit, told)
        photo, _ = visit.at_hand
        names = list(dict.fromkeys([settled.method, *told["others"]]))
        if len(names) < 2:
            raise ValueError("choose at least one other method to compare with")
        known = {name: one for name, one in settled.given.items() if one not in (None, "")}
        axes = {"rows": ("method", names), "columns": ("seed", [settled.settings["seed"]])}
        found = planned(settled.method, **axes, **known)

        def work(sd: Any, watch: Any) -> Image.Image:
            watch.expect(found.plans, [])
            return draw_sheet(found, sd, photo, watch=watch).image

        yield from self.page_of(visit, told, work)

    def page_of(self, visit: Visit, told: dict[Any, Any], work: Callable[[Any, Any], Any]) -> Iterator[Any]:
        for one in self.running(visit, (told["model"], tuple(told["lora"] or ())), work):
            if isinstance(one, Ended):
                yield {"sheet": self.update(value=one.made, visible=True), "status": said(noted(one))}
            else:
                yield one

    @property
    def seed(self) -> Any:
        return next(key for key in self.options if key[0] == "seed")


# ---------------------------------------------------------------- controls


def kind_of(one: Option | None) -> Any:
    """By what an option's control is known: methods may have options of one name and several kinds."""
    return None if one is None else (one.name, one.type.__name__, one.choices)


def all_options(methods: Sequence[str]) -> dict[Any, Option]:
    """Every option of these methods, of any inversion and any mask, the common ones first."""
    places = [place for name in methods for place in (SYSTEMS[name].edit,)] + [*INVERSIONS.values(), *MASKS.values()]
    found = {kind_of(one): one for one in COMMON.values()}
    for place in dict.fromkeys(places):
        found |= {kind_of(one): one for one in options_of(function_at(place)).values() if kind_of(one) not in found}
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
    gr.Image.preprocess = uploaded
    for kind in (gr.Slider, gr.Number, gr.Dropdown, gr.CheckboxGroup, gr.Checkbox, gr.Textbox):
        kind.preprocess = as_it_is


def as_it_is(_: Any, value: Any) -> Any:
    return value


def uploaded(_: Any, payload: Any) -> tuple[str, str] | None:
    """The file that a visitor sent, where the server put it, and the name that it came with."""
    if payload is None:
        return None
    if not payload.path or not os.path.isfile(payload.path):
        raise ValueError("a picture must come as a file")
    return payload.path, Path(payload.orig_name or payload.path).name


def examples() -> dict[str, tuple[Path, str, str]]:
    """Scenes that the miniature was made for, as far as they are here: name -> picture, source, target."""
    scenes, shown = find_mini() / "scenes", dict[str, tuple[Path, str, str]]()
    known = [{"folder": "horse-zebra"} | {side: f"a photo of a {one} on a grass field" for side, one in PAIR.items()}]
    listed = scenes / "scenes.json"
    for one in json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else known:
        if (file := scenes / one["folder"] / "source.png").exists():
            shown[one["folder"].replace("-", " to ", 1)] = file, one["source"], one["target"]
    return dict([*shown.items()][:6])


PAIR = {"source": "horse", "target": "zebra"}


# ---------------------------------------------------------------- words


def spoken(name: str) -> str:
    return name.replace("_", " ")


def said(text: str, role: str = "status") -> str:
    """A line of the page that is read out when it changes."""
    return f'<p role="{role}" class="said {role}">{text}</p>'


def about(method: str) -> str:
    system = SYSTEMS[method]
    paper = f"arXiv {system.paper}" if system.paper.replace(".", "").isdigit() else system.paper
    return said(escape(f"{paper}{'; ' if system.note else ''}{system.note}"), "note")


def bar(one: Seen) -> str:
    left = "" if one.left is None else f", {one.left:.0f} s left"
    meter = f'<progress max="{max(1, one.total)}" value="{one.done}" aria-label="model rows done"></progress>'
    return said(f"{meter} {escape(one.stage)}: {one.done} of {one.total} rows{left}")


def noted(one: Ended) -> str:
    """The end of a run: what it warned of, what it cost."""
    lines = [escape(text) for text in one.warnings]
    if isinstance(one.made, Result):
        lines.insert(0, escape(cost_of(one.made)))
    return "<br>".join(lines or ["Done."])


def cost_of(one: Result) -> str:
    rows = ", ".join(f"{stage} {n}" for stage, n in one.evaluations.items())
    return f"UNet rows {one.rows} ({rows}), {sum(one.seconds.values()):.1f} s"


def about_result(one: Result) -> str:
    return f"{one.method}, seed {one.seed}, {one.verdict}: {cost_of(one)}"


# ---------------------------------------------------------------- the server


class Local:
    """Between Gradio and the browser: the page asks no other machine for anything, and may not."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
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
    with tempfile.TemporaryDirectory(prefix="minidiffedit-page-") as name, library_decoders():
        folder = Path(name).resolve()
        uploads = folder / "uploads"
        os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
        import gradio as gr
        from starlette.middleware import Middleware

        trusting_nothing(gr)
        blocks = Page(studio, setup, folder).build().queue(max_size=20)
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
            **COLOURS
        )
        app = {"middleware": [Middleware(Local)], "docs_url": None, "redoc_url": None}
        looks = {"theme": theme, "css": part("page.css"), "js": part("page.js"), "footer_links": []}
        limits = {"max_file_size": LARGEST, "strict_cors": True, "share": False, "ssr_mode": False}
        _, url, _ = blocks.launch(
            server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, app_kwargs=app, **looks, **limits
        )
        try:
            yield url
        finally:
            blocks.close()


@contextmanager
def library_decoders() -> Iterator[None]:
    """Gradio opens pictures with whatever Pillow has: here with what the library reads."""
    Image.init()
    before = [*Image.ID]
    Image.ID[:] = [kind for kind in before if kind in (*images.READ, "MPO")]
    try:
        yield
    finally:
        Image.ID[:] = before
