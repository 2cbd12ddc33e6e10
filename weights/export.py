"""Write a trained miniature in the folder layout of the official checkpoints, and the example scenes beside it."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from minidiffedit.clip import CLIPConfig
from minidiffedit.tokenizer import BOS_TEXT, EOS_TEXT, LENGTH, build_vocab, packaged_merges
from minidiffedit.unet import UNetConfig
from minidiffedit.vae import VAEConfig

from . import scenes
from .scenes import EVAL_SEEDS, Scene

DIFFUSERS = "0.42.1"  # its pipeline overrules the sample size of a smaller model that claims a version below 0.9


@dataclass(frozen=True)
class Example:
    """A scene to ship: seed, object and place of the source, and one kind of edit."""

    seed: int
    object: str
    place: str
    to: str | None = None  # swap for this object
    to_place: str | None = None
    add: bool = False  # the edit adds the object; otherwise, with no other field set, it removes it

    @property
    def kind(self) -> str:
        return "swap" if self.to else "place" if self.to_place else "add" if self.add else "remove"

    def pair(self) -> tuple[Scene, Scene]:
        """(source, true edit)"""
        s = scenes.scene(EVAL_SEEDS.start + self.seed, self.object, self.place, count=1)
        if self.to:
            return s, s.swap(self.to)
        if self.to_place:
            return s, s.move_to(self.to_place)
        return (s.remove(), s) if self.add else (s, s.remove())


EXAMPLES = {
    "horse-zebra": Example(4, "a horse", "a grass field", to="a zebra"),
    "dog-cat": Example(2, "a dog", "a sandy beach", to="a cat"),
    "fruit-flowers": Example(3, "a bowl of fruit", "a wooden table", to="a bouquet of flowers"),
    "zebra-horse": Example(1, "a zebra", "a sandy beach", to="a horse"),
    "cat-dog": Example(5, "a cat", "a grass field", to="a dog"),
    "apple-pear": Example(6, "an apple", "a wooden table", to="a pear"),
    "lemon-strawberry": Example(7, "a lemon", "the snow", to="a strawberry"),
    "cow-elephant": Example(8, "a cow", "a grass field", to="an elephant"),
    "car-bus": Example(9, "a car", "a brick road", to="a bus"),
    "salad-cake": Example(10, "a bowl of salad", "a wooden table", to="a cake"),
    "panda-tiger": Example(11, "a panda", "the snow", to="a tiger"),
    "elephant-pig": Example(12, "an elephant", "a brick road", to="a pig"),
    "horse-to-beach": Example(13, "a horse", "a grass field", to_place="a sandy beach"),
    "car-to-snow": Example(14, "a car", "a brick road", to_place="the snow"),
    "rabbit-removed": Example(15, "a rabbit", "a grass field"),
    "sailboat-added": Example(16, "a sailboat", "the sea at sunset", add=True),
}


def write_examples(folder: Path) -> None:
    """folder/NAME/{source,target,mask}.png and folder/scenes.json. Masks: white = may change, soft edges."""
    records = []
    for name, example in EXAMPLES.items():
        before, after = example.pair()
        (folder / name).mkdir(parents=True)
        Image.fromarray(before.picture()).save(folder / name / "source.png", optimize=True)
        Image.fromarray(after.picture()).save(folder / name / "target.png", optimize=True)
        scenes.mask_image(scenes.true_mask(before, after)).save(folder / name / "mask.png", optimize=True)
        captions = {"source": before.caption(), "target": after.caption()}
        records.append({"folder": name, "kind": example.kind, **captions, "seed": EVAL_SEEDS.start + example.seed})
    write_json(folder / "scenes.json", records)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def unet_json(config: UNetConfig) -> dict[str, object]:
    n = len(config.block_out_channels)
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS,
        "act_fn": "silu",
        "attention_head_dim": config.attention_head_dim,
        "block_out_channels": list(config.block_out_channels),
        "center_input_sample": False,
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": ["CrossAttnDownBlock2D"] * (n - 1) + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (n - 1),
    }


def vae_json(config: VAEConfig) -> dict[str, object]:
    n = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS,
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": scenes.SIDE,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * n,
    }


def text_json(config: CLIPConfig) -> dict[str, object]:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,  # this and the two ids below are the official file's, wrong there too, and never used
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": config.hidden_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "clip_text_model",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pad_token_id": 1,
        "projection_dim": config.hidden_size,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
    }


def write_tokenizer(folder: Path) -> None:
    """CLIP's own, from its merges; vocab.json and merges.txt equal the official files byte for byte."""
    merges = packaged_merges()
    folder.mkdir(parents=True)
    vocab = json.dumps(build_vocab(merges), ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    (folder / "vocab.json").write_text(vocab, "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    special = {"bos_token": BOS_TEXT, "eos_token": EOS_TEXT, "unk_token": EOS_TEXT}
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    added = {key: {"content": text, **flags} for key, text in special.items()} | {"pad_token": EOS_TEXT}
    write_json(folder / "special_tokens_map.json", added)
    typed = {key: {"__type": "AddedToken", **v} if isinstance(v, dict) else v for key, v in added.items()}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": LENGTH,
                "tokenizer_class": "CLIPTokenizer"}  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings | typed)


SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": DIFFUSERS,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": DIFFUSERS,
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_weights(module: nn.Module, path: Path, prefix: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = module.state_dict()
    tensors = {prefix + name: p.detach().to("cpu", torch.float16).contiguous() for name, p in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for the owner only


def export(vae: nn.Module, vae_config: VAEConfig, text: nn.Module, unet: nn.Module, target: Path) -> None:
    """The three networks -> the folder `target`, exchanged only when complete; what else lies there is kept.
    Prints the lines of the card's table: file, bytes, sha256.
    """
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_weights(vae, part / "vae" / "diffusion_pytorch_model.safetensors")
    write_weights(unet, part / "unet" / "diffusion_pytorch_model.safetensors")
    write_weights(text, part / "text_encoder" / "model.safetensors", prefix="text_model.")
    write_json(part / "vae" / "config.json", vae_json(vae_config))
    write_json(part / "unet" / "config.json", unet_json(unet.config))  # type: ignore[arg-type]
    write_json(part / "text_encoder" / "config.json", text_json(text.config))  # type: ignore[arg-type]
    write_json(part / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(part / "model_index.json", MODEL_INDEX)
    write_tokenizer(part / "tokenizer")
    write_examples(part / "scenes")
    old = target.with_name(target.name + ".old")
    if target.exists():
        for path in target.iterdir():
            if not (part / path.name).exists():
                (shutil.copytree if path.is_dir() else shutil.copy)(path, part / path.name)
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    for path in sorted(target.rglob("*.safetensors")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"| `{path.relative_to(target).as_posix()}` | {path.stat().st_size:,} | {digest} |")
