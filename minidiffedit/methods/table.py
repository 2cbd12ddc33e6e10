"""Every editing system by name: a row, not a branch. A new method is a file in this folder and one row of SYSTEMS; a
published combination of what is there is a row alone.
"""

from .system import System, blocked, todo

# What makes a `path` of a picture; any of them feeds any editor that takes one.
INVERSIONS = {
    "ddim": "inversions:ddim",
    "direct": "inversions:direct",
    "null-text": "null_text:null_text",
    "negative-prompt": "inversions:negative_prompt",
    "edit-friendly": "edit_friendly:edit_friendly",
    "cycle": "cycle_diffusion:cycle",
    "cycle-sde": "sde_diffedit:cycle_sde",
    "ddim-paper": "inversions:ddim_paper",
    "aidi": "inversions:aidi",
    "noise": "inversions:noise",
    "dpl": "dpl:dpl",
    "style-diffusion": "style_diffusion:style_diffusion",
}

# What makes a `mask` where none is given; `words+diffedit` takes another one than DiffEdit's.
MASKS = {
    "contrast": "diffedit:contrast",
    "contrasts": "diffedit_regions:contrasts",
    "quartiles": "diffedit:quartiles",
    "words": "word_maps:word_mask",
    "relevance": "watch_your_steps:relevance",
}

PAPER = {"encode_text": "null", "strength": 0.8}  # DiffEdit's encoding: under no text, up to .8 of the noise
IP2P = "instruct_pix2pix:instruct_pix2pix"
P2P = "prompt_to_prompt:prompt_to_prompt"
MASA = "masactrl:masactrl"
HARNESS = {"cross_steps": 0.4, "self_steps": 0.6, "self_levels": 2}
UNION = {"look": "union", "null_look": "union"}
LEDITS = {"steps": 40, "strength": 0.85, "sampler": "dpmsolver++"}
SKIP, CROSS = {"steps": 100, "guidance_scale": 15.0}, {"steps": 100, "strength": 0.68}
WATCH = "watch_your_steps:watch_your_steps"
NEAR = "DiffEdit, decoded in one rectangle around its mask: faster where that is small; approximate"
READING, LORA = "our reading of its abstract", "by LoRA, where its authors train all weights"
STYLE, DISENTANGLED = HARNESS | {"cross_steps": 0.6, "self_steps": 0.8}, "disentanglement:disentanglement"
RATED = "weights for SD 1.5; to the conditional ones say '..., image quality is five out of five'"
GIVEN_MASK = "DiffEdit under the mask and captions that other networks made of an instruction, given"
CANDIDATES = "our reading: samples (seeds) under a given segment's mask; the network that ranks them is missing"
FILL = "inpainting:inpaint"
ANYTHING = "fill; replace: with --invert; its masks are yours to give, as is what removes without a text"
CLIP_IMAGE = "needs CLIP's image tower, which no SD v1 file has"

SYSTEMS = {
    # DiffEdit and the arms of its ablation
    "diffedit": System("2210.11427", "diffedit:decode", "ddim", PAPER, mask="contrast"),
    "diffedit-regions": System("2210.11427", "diffedit_regions:decode_edits", "ddim", PAPER, mask="contrasts"),
    "user-mask": System("2210.11427", "diffedit:decode", "ddim", PAPER, note="DiffEdit's decoding under your mask"),
    "encode-only": System("2210.11427", "diffedit:decode_all", "ddim", PAPER, note="DiffEdit without its mask"),
    "mask-only": System("2210.11427", "diffedit:decode", "noise", mask="contrast", note="DiffEdit from random noise"),
    "reconstruction": System("2210.11427", "diffedit:reconstruct", "ddim", PAPER, note="what the encoding loses"),
    # noise and denoise
    "sdedit": System("2108.01073", "sdedit:sdedit"),
    "text-to-image": System("2112.10752", "text_to_image:text_to_image", note="no picture goes in: `generate`"),
    "blended-latent-diffusion": System("2206.02779", "blended_latent:blended_latent"),
    "null-text-guidance": System("2305.06710", "null_text_guidance:null_text_guidance"),
    "noise-diffusion": System("2403.08840", "noise_diffusion:noise_diffusion", note="between two pictures"),
    # inversions and what they feed
    "replay": System("2010.02502", "replay:replay", "ddim", note="an inversion decoded under another text"),
    "null-text-inversion": System("2211.09794", P2P, "null-text", {"self_steps": 0.5, "self_levels": 2}, letter="B"),
    "negative-prompt-inversion": System("2305.16807", P2P, "negative-prompt", {"self_levels": 2}),
    "pnp-inversion": System("2310.01506", P2P, "direct", HARNESS, note="with its settings"),
    "direct-inversion": System("2211.07825", "replay:replay", "ddim", PAPER, note="our reading of its abstract"),
    "edit-friendly-ddpm": System("2304.06140", "replay:replay", "edit-friendly", SKIP, note="the top 36 % skipped"),
    "cycle-diffusion": System("2210.05559", "replay:replay", "cycle", {"steps": 100, "guidance_scale": 2.0}),
    "ledits++": System("2311.16711", "ledits:ledits", "edit-friendly", LEDITS),
    "edict": System("2211.12446", "edict:edict"),
    "proxedit": System("2306.05414", "proxedit:proxedit", "negative-prompt"),
    "sde-diffedit": System("2311.01410", "sde_diffedit:decode", "cycle-sde", mask="contrast"),
    "sde-drag": System("2311.01410", "sde_drag:sde_drag", note="without the LoRA that its authors train"),
    "sige": System("2211.02048", "sige:sige", mask="contrast", note=NEAR),
    # attention, features, words
    "masactrl": System("2304.08465", MASA, "direct"),
    "masactrl-union": System("2304.08465", MASA, "direct", UNION, note="looks at itself, too"),
    "prox-masactrl": System("2306.05414", MASA, "negative-prompt", {"guidance": "prox"}, note="ProxEdit's"),
    "prompt-to-prompt": System("2208.01626", P2P, "direct"),
    "plug-and-play": System("2211.12572", "plug_and_play:plug_and_play", "direct"),
    "pfb-diff": System("2306.16894", "pfb_diff:pfb_diff", "ddim"),
    "ti-guided-edit": System("2401.02126", "ti_guided:ti_guided_edit", "ddim"),
    "cross-image-attention": System("2311.03335", "cross_image:cross_image_attention", "edit-friendly", CROSS),
    "tf-icon": System("2307.12493", "tf_icon:tf_icon"),
    "tic-inversion": System("2312.14611", "tic_inversion:tic", "ddim-paper", note="our reading of its abstract"),
    # gradients, drags, weights of one picture
    "dds": System("2304.07090", "dds:dds", letter="B"),
    "sds": System("2209.14988", "dds:sds", letter="B"),
    "pix2pix-zero": System("2302.03027", "pix2pix_zero:pix2pix_zero", "direct", letter="B"),
    "cds": System("2311.18608", "cds:cds", letter="B"),
    "dpl": System("2309.15664", P2P, "dpl", {"self_levels": 2}, letter="B"),
    "style-diffusion": System("2303.15649", P2P, "style-diffusion", STYLE, letter="B", note="its direct variant"),
    "mag-edit": System("2312.11396", "mag_edit:mag_edit", "null-text", letter="B"),
    "baret": System("2312.05482", "baret:baret", letter="B", note=READING),
    "kv-inversion": System("2309.16608", "kv_inversion:kv_inversion", letter="B", note=READING),
    "disentanglement": System(
        "2212.08698", DISENTANGLED, "edit-friendly", note="a fixed schedule, not learned by CLIP"
    ),
    "drag-diffusion": System("2306.14435", "drag_diffusion:drag_diffusion", letter="B"),
    "drag-noise": System("2404.01050", "drag_diffusion:drag_noise", letter="B"),
    "dragon-diffusion": System("2307.02421", "dragon_diffusion:dragon_diffusion", "ddim", letter="B"),
    "imagic": System("2210.09276", "imagic:imagic", letter="B", note=LORA),
    "sine": System("2212.04489", "sine:sine", letter="B", note=LORA),
    "latent-inversion": System("2402.08601", "latent_inversion:latent_inversion", letter="B", note=READING),
    # checkpoints of their own
    "sd-inpainting": System("2112.10752", FILL, letter="C", weights="inpainting"),
    "inpaint-anything": System("2304.06790", FILL, letter="C", weights="inpainting", note=ANYTHING),
    "instruct-pix2pix": System("2211.09800", IP2P, letter="C", weights="instruct"),
    "magicbrush": System("2306.10012", IP2P, letter="C", weights="instruct", note="its weights, InstructPix2Pix's way"),
    "hive": System("2303.09618", IP2P, letter="C", weights="instruct", note=RATED),
    "watch-your-steps": System("2308.08947", WATCH, mask="relevance", letter="C", weights="instruct"),
    "paint-by-example": System("2211.13227", "paint_by_example:paint", letter="C", weights="example"),
    "controlnet": todo(
        "2302.05543", "C", "its sums go into the skips alone, which no hook reaches; its encoder is a second checkpoint"
    ),
    # what another network found is given as a file
    "instructedit": System("2305.18047", "diffedit:decode", "ddim", PAPER, letter="D", note=GIVEN_MASK),
    "mfl": System("2212.07603", "blended_latent:blended_latent", letter="D", note=CANDIDATES),
    "diffusion-clip": todo("2110.02711", "D", CLIP_IMAGE + "; its own weights are pixel models of faces"),
    "blended-diffusion": todo("2111.14818", "D", CLIP_IMAGE + "; its own model is one of pixels"),
    "style-diffusion-wang": todo("Wang et al., ICCV 2023", "D", CLIP_IMAGE + "; no code was published"),
    "b-lora": todo("2403.14572", "D", "trains two blocks of SDXL's UNet, which SD v1 does not have"),
    # other networks
    "dream-inpainter": blocked("2312.03771", "its trained weights were not published"),
    "moe-controller": blocked("2309.04372", "neither code nor the experts' weights were published"),
    "drag-gan": blocked("2305.10973", "a StyleGAN2, not a diffusion model"),
    "glide": blocked("2112.10741", "pixel-space networks of its own"),
    "sora": blocked("OpenAI, 2024", "a video model without public weights"),
    "cyclegan": blocked("1703.10593", "a GAN without text"),
    "ct-dual-stream": blocked("a CT super-resolution network", "trained on CT scans, no text"),
    "controlnet++": blocked("2404.07987", "its training rewards need segmentation, edge and depth networks"),
}
