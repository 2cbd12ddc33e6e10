"""LoRAs against peft and weighted texts against compel, on the tiny model: prints the largest differences.

    pip install peft compel accelerate && python tests/bench/addons.py [--write]

--write makes tests/data/compel.json anew: what compel reads of each text of TEXTS, and for each position of its
embedding one number, the sum of its coordinates times cos 0, cos 1, ...
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_addons
import tiny
from proofs import pipeline

from minidiffedit import StableDiffusion

SENTENCE = "a horse on a meadow, with flowers; "
TEXTS = [
    "a horse", "a (big)+ horse", "a big++ horse", "a big-- horse", "(a horse)1.3 on grass", "a (horse)0.5 on grass",
    'a "black horse"1.2 and a (white (small)1.3 horse)0.8', "a mid-air horse+ .", "horse(big)+ x", "(a - b)+ c",
    "a \\(big\\)+ horse", "horse+s, zebra--, x", "(a horse, a zebra. yes)1.1 end", "(unclosed horse", "a (b)-1.5 c",
    "a (b).5 c", "", "  ", "wow... (wow...)+", "it's a (dog's)1.2 life", SENTENCE * 9, f"({SENTENCE * 9})1.2",
    SENTENCE.replace(";", ".") * 9, "x " * 200, f"{SENTENCE * 8} (zebra)0.3 {SENTENCE * 8}", "a +b c+ d- -e", '"a',
    '""+ b', "a,b,(c)1.1", "(a)+1.5", "((a))1.5 (((b)1.1)1.1)0.9", "a horse. " + "many words here now " * 30, "(a)0",
    "a (big)-0.5 x", 'an "old \\"grey\\" horse"+',
]  # fmt: skip


def against_peft(folder: Path, place: Path) -> None:
    from diffusers import StableDiffusionPipeline

    for naming in test_addons.NAMINGS:
        alpha = None if naming in ("peft", "diffusers", "processors") else 1.5  # diffusers' own files hold no alpha
        path, _ = test_addons.lora(place / f"{naming}.safetensors", naming, alpha)
        ours = test_addons.weights(StableDiffusion.load(folder, device="cpu", lora=[(path, 0.8)]))
        (place / naming).mkdir()
        peer = pipeline(StableDiffusionPipeline, folder, place / naming)
        try:
            peer.load_lora_weights(str(path))
        except Exception as error:
            print(f"{naming}: the peer cannot read it ({str(error).splitlines()[0][:80]})")
            continue
        peer.fuse_lora(lora_scale=0.8)
        peer.unload_lora_weights()
        theirs = {f"unet.{name}": one for name, one in peer.unet.state_dict().items()}
        for name, one in peer.text_encoder.state_dict().items():
            theirs[f"text_encoder.text_model.{name.removeprefix('text_model.')}"] = one
        apart = {name: float((ours[name] - one).abs().max()) for name, one in theirs.items() if name in ours}
        exact = sum(value == 0 for value in apart.values())
        print(f"{naming}: {exact} of {len(apart)} tensors bit-equal, largest difference {max(apart.values()):.1e}")


def against_compel(folder: Path, place: Path, write: bool) -> None:
    from compel import Compel
    from compel.prompt_parser import PromptParser
    from diffusers import StableDiffusionPipeline

    peer, sd = pipeline(StableDiffusionPipeline, folder, place), StableDiffusion.load(folder, device="cpu")
    compel = Compel(tokenizer=peer.tokenizer, text_encoder=peer.text_encoder, truncate_long_prompts=False)
    found, worst = [], 0.0
    for text in TEXTS:
        parts = [[part.text, part.weight] for part in PromptParser().parse_conjunction(text).prompts[0].children]
        z = compel(text)[0]
        worst = max(worst, float((sd.text([text], "compel")[0] - z).abs().max()))
        direction = torch.cos(torch.arange(z.shape[1], dtype=torch.float32))
        found.append({"text": text, "parts": parts, "embedding": [round(float(n), 4) for n in z @ direction]})
    print(f"{len(TEXTS)} texts: largest difference from compel {worst:.1e}")
    if write:
        lines = ",\n".join(json.dumps(one) for one in found)
        (Path(__file__).parents[1] / "data" / "compel.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        folder = tiny.write_folder(place / "tiny")
        against_peft(folder, place)
        against_compel(folder, place, "--write" in sys.argv)
