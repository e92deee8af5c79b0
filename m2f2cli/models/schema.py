"""What ``config.json`` may hold: every field's type and range, checked when it is read.

Only what is named here is taken. No field names a file, an address or code: of the arguments of
timm, open_clip and transformers those that shape a network are let through, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

from m2f2cli.errors import ConfigError

DETECTOR, EXPLAINER = "m2f2_detector", "m2f2_explainer"
_WORD = re.compile(r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*")
_SHOWN = 60
_HINT = "Correct it, or take the file from where the model came."


class Rule(NamedTuple):
    """What one value must be.

    Attributes:
        says: That, in words.
        fits: Whether a value is so.
    """

    says: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Part:
    """What a mapping must be.

    Args:
        rules: By field.
        required: The fields it must have.
        others: What fields without a rule must be; None refuses them.
        optional: Whether None may stand in its place.
    """

    rules: Mapping[str, Rule | Part]
    required: Sequence[str] = ()
    others: Rule | None = None
    optional: bool = False


def check(value: Any, part: Part, where: str = "") -> None:
    """Compare a mapping with what it must be.

    Args:
        value: As it was read.
        part: What it must be.
        where: The field it stands in, with a dot behind; empty for a whole file.

    Raises:
        ConfigError: Names the field at fault and what it must be.
    """
    if value is None and part.optional:
        return
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where[:-1]} is {_show(value)}, not a mapping of fields.", _HINT)
    for name in part.required:
        if name not in value:
            raise ConfigError(f"{where}{name} is missing.", _HINT)
    for name, inner in value.items():
        rule = part.rules.get(name, part.others)
        if rule is None:
            raise ConfigError(
                f"'{where}{str(name)[:_SHOWN]}' is not a field that a configuration may have.",
                "Remove it; files, addresses and code are never taken from a configuration.",
            )
        if isinstance(rule, Part):
            check(inner, rule, f"{where}{name}.")
        elif not rule.fits(inner):
            said = f"{where}{str(name)[:_SHOWN]} is {_show(inner)}"
            raise ConfigError(f"{said}; it must be {rule.says}.", _HINT)


def _show(value: Any) -> str:
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return f"a {'mapping' if isinstance(value, Mapping) else 'list'} of {len(value)}"
    shown = repr(value) if not isinstance(value, int) or value.bit_length() < 256 else "huge"
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


# --- rules --------------------------------------------------------------------------------------


def whole(low: int, high: int) -> Rule:
    """An integer of a range, both ends included."""
    says = f"a whole number from {low} to {high}"
    return Rule(says, lambda value: _plain(value, int) and low <= value <= high)


def number(low: float, high: float, *, above: bool = False) -> Rule:
    """A finite number of a range; with ``above`` its lower end is left out."""

    def fits(value: Any) -> bool:
        if not _plain(value, int | float) or not low <= value <= high:
            return False
        return not (above and value == low)

    return Rule(f"a number {'above' if above else 'from'} {low:g} up to {high:g}", fits)


def _plain(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def one_of(*values: Any) -> Rule:
    """One of some values, of the same type."""
    says = " or ".join(repr(value) for value in values)
    return Rule(says, lambda v: any(type(v) is type(known) and v == known for known in values))


def maybe(rule: Rule) -> Rule:
    """None, or what a rule says."""
    return Rule(f"{rule.says}, or null", lambda value: value is None or rule.fits(value))


def listing(rule: Rule, low: int, high: int) -> Rule:
    """A list of so many values, each as a rule says."""

    def fits(value: Any) -> bool:
        fitting = isinstance(value, list | tuple) and low <= len(value) <= high
        return fitting and all(rule.fits(item) for item in value)

    count = str(low) if low == high else f"{low} to {high}"
    return Rule(f"a list of {count} values, each {rule.says}", fits)


def either(*rules: Rule) -> Rule:
    """What one of several rules says."""
    says = " or ".join(rule.says for rule in rules)
    return Rule(says, lambda value: any(rule.fits(value) for rule in rules))


FLAG = one_of(True, False)
WORD = Rule(
    "a name of letters, digits and underscores",
    lambda value: isinstance(value, str) and len(value) <= 100 and bool(_WORD.fullmatch(value)),
)
ANY = Rule("anything", lambda value: True)
TEXT = Rule("a text", lambda value: isinstance(value, str) and len(value) <= 4096)
# Where transformers found a model; never read again.
_PLACE_NAME = Rule("a text", lambda value: isinstance(value, str | PathLike))
_ANY_NUMBER = number(-1e12, 1e12)
_SHARE = number(0, 1)
_WIDTH, _INNER, _LAYERS = whole(1, 65_536), whole(1, 262_144), whole(1, 256)
_HEADS, _WORDS, _SIDE = whole(1, 1024), whole(1, 1 << 22), whole(1, 8192)
_EPSILON = number(0, 1)
_TOKEN = maybe(whole(-(1 << 31), 1 << 31))
_TOKENS = either(_TOKEN, listing(whole(0, 1 << 31), 1, 64))
_ACTIVATION = one_of(
    *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh"),
    *("quick_gelu", "relu", "relu2", "relu6", "silu", "swish", "sigmoid", "tanh", "mish"),
)
_KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_ATTENTION = Rule(
    " or ".join(_KERNELS),
    lambda value: (
        value is None
        or value in _KERNELS
        or (isinstance(value, dict) and all(v is None or v in _KERNELS for v in value.values()))
    ),
)
_DTYPE = Rule(
    "float16, bfloat16, float32 or float64",
    lambda value: (
        value is None
        or str(value).removeprefix("torch.")
        in ("float16", "bfloat16", "float32", "float64", "auto")
    ),
)
_LABELS = Part({}, others=either(TEXT, whole(0, 1 << 20)), optional=True)

# --- the parts of a configuration ---------------------------------------------------------------

# What transformers writes into every configuration, or hands on while it reads one.
_BASE: dict[str, Rule | Part] = {
    "model_type": TEXT,
    "architectures": maybe(listing(WORD, 0, 8)),
    "transformers_version": maybe(TEXT),
    "_name_or_path": maybe(_PLACE_NAME),
    "name_or_path": maybe(_PLACE_NAME),
    "_commit_hash": maybe(WORD),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "attn_implementation": _ATTENTION,
    "id2label": _LABELS,
    "label2id": _LABELS,
    "num_labels": maybe(whole(0, 1 << 20)),
    "problem_type": maybe(WORD),
    "chunk_size_feed_forward": maybe(whole(0, 0)),
    **dict.fromkeys(
        (
            *("output_hidden_states", "output_attentions", "return_dict", "is_encoder_decoder"),
            *("is_decoder", "add_cross_attention", "tie_word_embeddings", "tie_encoder_decoder"),
            *("use_cache", "torchscript", "use_bfloat16"),
        ),
        maybe(FLAG),
    ),
}
# What of timm.create_model's arguments shapes a network. Texts are names that timm looks up.
_SHAPE = either(maybe(_ANY_NUMBER), FLAG, WORD)
_SHAPES = listing(either(whole(0, 8192), number(0, 8192)), 1, 8)
_SIZE = either(whole(1, 8192), listing(whole(1, 8192), 1, 8))
_DEPTH = either(whole(1, 100), listing(whole(1, 100), 1, 8))
_BACKBONE = Part(
    {
        **dict.fromkeys(
            (
                *("img_size", "patch_size", "window_size", "embed_dim", "embed_dims", "num_heads"),
                *("dims", "channels", "width", "widths", "base_width", "cardinality", "groups"),
                *("growth_rate", "num_init_features", "head_dim", "stem_width", "stem_size"),
                *("output_stride", "kernel_size", "kernel_sizes", "num_features"),
            ),
            _SIZE,
        ),
        **dict.fromkeys(("depth", "depths", "layers"), _DEPTH),
        **dict.fromkeys(
            (
                *("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate"),
                *("pos_drop_rate", "patch_drop_rate", "drop_block_rate"),
            ),
            _SHARE,
        ),
        **dict.fromkeys(("mlp_ratio", "mlp_ratios"), either(number(0, 64, above=True), _SHAPES)),
        "reg_tokens": whole(0, 64),
        **dict.fromkeys(
            ("init_values", "ls_init_value", "layer_scale_init_value", "norm_eps"),
            maybe(number(0, 100)),
        ),
        **dict.fromkeys(
            (
                *("qkv_bias", "qk_norm", "class_token", "no_embed_class", "pre_norm", "fc_norm"),
                *("final_norm", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"),
                *("always_partition", "fix_stem", "avg_down", "memory_efficient"),
            ),
            maybe(FLAG),
        ),
        **dict.fromkeys(
            ("global_pool", "act_layer", "norm_layer", "aa_layer", "stem_type", "pad_type"),
            maybe(Rule(WORD.says, lambda value: value == "" or WORD.fits(value))),
        ),
    },
    optional=True,
)
_TOWER: dict[str, Rule | Part] = {
    "model_type": TEXT,
    "hidden_size": _WIDTH,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "hidden_act": _ACTIVATION,
    "layer_norm_eps": _EPSILON,
    "projection_dim": maybe(_WIDTH),
    "attention_dropout": _SHARE,
    "dropout": _SHARE,
    "initializer_range": _SHARE,
    "initializer_factor": number(0, 1000),
}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
VISION = Part(
    {**_BASE, **_TOWER, "num_channels": whole(3, 3), "image_size": _SIDE, "patch_size": _SIDE},
    (*_SIZES, "image_size", "patch_size"),
)
TEXT_TOWER = Part(
    {
        **_BASE,
        **_TOWER,
        "vocab_size": _WORDS,
        "max_position_embeddings": _WIDTH,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKENS),
    },
    _SIZES,
    optional=True,
)
_OPEN_CLIP: dict[str, Rule | Part] = {
    "layers": _LAYERS,
    "width": _WIDTH,
    "mlp_ratio": number(0, 64, above=True),
    "ls_init_value": maybe(number(0, 100)),
    "pool_type": WORD,
    **dict.fromkeys(
        (
            *("output_tokens", "final_ln_after_pool", "qk_norm", "scaled_cosine_attn"),
            *("scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"),
        ),
        FLAG,
    ),
    "block_type": maybe(WORD),
}
# Fields of open_clip's text parts that are never handed on: no word is read here.
OPEN_CLIP_TOKENIZER = ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")
OPEN_CLIP_VISION = Part(
    {
        **_OPEN_CLIP,
        "head_width": _WIDTH,
        "image_size": _SIDE,
        "patch_size": _SIDE,
        "patch_dropout": _SHARE,
        "no_ln_pre": FLAG,
        "attentional_pool": FLAG,
        "attn_pooler_queries": _WIDTH,
        "attn_pooler_heads": _HEADS,
        "pos_embed_type": WORD,
    },
    ("layers", "width", "image_size", "patch_size"),
)
OPEN_CLIP_TEXT = Part(
    {
        **_OPEN_CLIP,
        "heads": _HEADS,
        "context_length": _WIDTH,
        "vocab_size": _WORDS,
        "pad_id": whole(0, 1 << 22),
        "eos_id": whole(0, 1 << 22),
        "proj_type": WORD,
        **dict.fromkeys(("embed_cls", "no_causal_mask", "proj_bias"), FLAG),
        **dict.fromkeys(OPEN_CLIP_TOKENIZER, ANY),
    },
    optional=True,
)
_LIBRARY = {"library": one_of("transformers", "open_clip")}
CLIP = {
    "transformers": Part({**_LIBRARY, "vision": VISION, "text": TEXT_TOWER}, ("vision",)),
    "open_clip": Part(
        {
            **_LIBRARY,
            "vision": OPEN_CLIP_VISION,
            "text": OPEN_CLIP_TEXT,
            "embed_dim": _WIDTH,
            "quick_gelu": FLAG,
        },
        ("vision", "text", "embed_dim"),
    ),
}
_DOMAIN = Part(
    {
        "mean": listing(_ANY_NUMBER, 6, 6),
        "basis": listing(listing(_ANY_NUMBER, 6, 6), 6, 6),
        "limit": number(0, 1e12),
        "size": whole(1, 4096),
    },
    ("limit",),
    optional=True,
)
_BRIDGE = Part(
    {
        "width": _WIDTH,
        "heads": _HEADS,
        "size": _WIDTH,
        "clip_layers": listing(whole(0, 256), 3, 3),
    },
    ("width", "heads", "size", "clip_layers"),
    optional=True,
)
_DETECTOR = Part(
    {
        **_BASE,
        "backbone": maybe(WORD),
        "backbone_kwargs": _BACKBONE,
        # See CLIP.
        "clip": Part({}, others=ANY, optional=True),
        "hidden_size": _WIDTH,
        "prompt_tokens": whole(0, 1024),
        "vision_layer": whole(-256, 256),
        "clip_blocks": listing(whole(1, 256), 0, 256),
        "forgery_map": FLAG,
        "head_normalize": FLAG,
        "head_hidden": maybe(_WIDTH),
        "kinds": maybe(listing(TEXT, 0, 256)),
        "bridge": _BRIDGE,
        "image_size": _SIDE,
        "image_mean": maybe(listing(number(-10, 10), 3, 3)),
        "image_std": maybe(listing(number(0, 10, above=True), 3, 3)),
        "crop": Part({"detector": WORD, "margin": number(0, 10)}, others=_SHAPE, optional=True),
        "threshold": _SHARE,
        "uncertain": maybe(listing(_SHARE, 2, 2)),
        "score_temperature": number(0, 1000, above=True),
        "domain": _DOMAIN,
        "kind_margin": maybe(number(0, 1e6)),
        "license": maybe(TEXT),
    },
)
_ROPE = Part(
    {"rope_type": WORD, "rope_theta": number(0, 1e12, above=True)},
    others=either(maybe(_ANY_NUMBER), FLAG, listing(_ANY_NUMBER, 1, 4096)),
    optional=True,
)
LLAMA = Part(
    {
        **_BASE,
        "model_type": one_of("llama"),
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": maybe(_HEADS),
        "head_dim": maybe(whole(1, 8192)),
        "vocab_size": _WORDS,
        "max_position_embeddings": whole(1, 1 << 26),
        "hidden_act": _ACTIVATION,
        "rms_norm_eps": _EPSILON,
        "initializer_range": _SHARE,
        "attention_dropout": _SHARE,
        "attention_bias": FLAG,
        "mlp_bias": FLAG,
        "pretraining_tp": whole(1, 1),
        "bos_token_id": _TOKENS,
        "eos_token_id": _TOKENS,
        "pad_token_id": _TOKEN,
        "rope_parameters": _ROPE,
        "rope_scaling": Part({}, others=either(_ROPE.others or TEXT, WORD), optional=True),
        "rope_theta": number(0, 1e12, above=True),
    }
)
_PLACE = whole(-(1 << 31), 1 << 31)
_EXPLAINER = Part(
    {
        **_BASE,
        "template": WORD,
        "image_aspect": WORD,
        "image_token_id": _PLACE,
        "deepfake_token_id": _PLACE,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKENS),
        "detector_config": _DETECTOR,
        "text_config": LLAMA,
    }
)
# Of a PEFT adapter what is read here; see also ``adapters.check_adapter``.
_ADAPTER = Part(
    {
        "peft_type": maybe(TEXT),
        "r": maybe(whole(1, 65_536)),
        "lora_alpha": maybe(number(-1e6, 1e6)),
        "modules_to_save": maybe(listing(TEXT, 0, 1024)),
        "base_model_name_or_path": maybe(TEXT),
    },
    others=ANY,
)
# Models of others whose sizes are read.
_FAMILIES = ("llava", "llama", "clip")
# Fields by which transformers loads code: of the folder, of the Hub, or of another package.
_CODE = ("attn_implementation", "experts_implementation", "auto_map", "quantization_config")


# --- whole configurations -----------------------------------------------------------------------


def check_config(fields: Mapping[str, Any]) -> None:
    """Check the content of a ``config.json`` of ours; that of another model is let through.

    Raises:
        ConfigError: A field is unknown, of another type, out of its range, or contradicts another.
    """
    if fields.get("model_type") == DETECTOR:
        check_detector(fields)
    elif fields.get("model_type") == EXPLAINER:
        check(fields, _EXPLAINER)
        check_detector(fields.get("detector_config", {}), "detector_config.")
        check_llama(fields.get("text_config", {}), "text_config.")
        check_explainer(fields, fields.get("text_config", {}).get("vocab_size", 32_000))
    elif "peft_type" in fields:
        check(fields, _ADAPTER)
    elif str(fields.get("model_type")).startswith(_FAMILIES):
        parts = (("", LLAMA), ("text_config", LLAMA), ("vision_config", VISION))
        for name, part in parts:
            check_known(fields.get(name, {}) if name else fields, part, f"{name}." if name else "")


def refuse_code(fields: Mapping[str, Any]) -> None:
    """Refuse a configuration of others, to be read by transformers, that names code to load.

    Raises:
        ConfigError: Names the field.
    """
    for name, value in fields.items():
        if name.removeprefix("_") in _CODE and value and value not in _KERNELS:
            raise ConfigError(f"'{name}' in a config.json can load code; it is not read.", _HINT)
        if isinstance(value, Mapping):
            refuse_code(value)


def check_known(value: Any, part: Part, where: str = "") -> None:
    """Check those fields of another model's configuration that are read here. See ``check``."""
    if isinstance(value, Mapping):
        ours = part.rules.keys() - _BASE.keys()
        value = {name: inner for name, inner in value.items() if name in ours}
    check(value, Part(part.rules), where)


def check_detector(fields: Mapping[str, Any], where: str = "") -> None:
    """Check a detector's fields; those left out have their defaults. Raises as ``check_config``."""
    check(fields, _DETECTOR, where)
    if fields.get("clip") is None:
        return
    blocks, grid = check_clip(fields["clip"], f"{where}clip.")
    vision, text = fields["clip"]["vision"], fields["clip"].get("text")
    side, tokens, room = fields.get("image_size"), fields.get("prompt_tokens", 7), _context(text)
    layer, bridge = fields.get("vision_layer", -2), fields.get("bridge") or {}
    used = layer if layer >= 0 else blocks + 1 + layer
    last = max([0, *fields.get("clip_blocks", ()), *bridge.get("clip_layers", ())])
    low, high = fields.get("uncertain") or (0, 1)
    domain = fields.get("domain")
    faults = {
        f"image_size is {side}, that of its CLIP tower {vision['image_size']}": (
            side is not None and side // vision["patch_size"] != grid
        ),
        f"vision_layer {layer} does not exist in a tower of {blocks} blocks": (
            not 0 <= used <= blocks
        ),
        f"block {last} is read of a tower that is run up to block {used}": last > used,
        f"prompt_tokens is {tokens}, its text tower reads 1 to {room}": (
            bool(text) and fields.get("forgery_map", True) and not 1 <= tokens <= room
        ),
        "uncertain begins above its end": low > high,
        "domain has a size, or mean and basis": (
            domain is not None and ("size" in domain) == ({"mean", "basis"} <= domain.keys())
        ),
    }
    _refuse(faults, where)


def _refuse(faults: Mapping[str, bool], where: str) -> None:
    """Raise the first of some faults, in words, that is one."""
    for said, wrong in faults.items():
        if wrong:
            raise ConfigError(f"The settings do not fit together: {where}{said}.", _HINT)


def _context(text: Mapping[str, Any] | None) -> int:
    """How many tokens a text tower reads."""
    names = ("max_position_embeddings", "context_length")
    return next((int(text[name]) for name in names if text and name in text), 77)


def check_clip(spec: Mapping[str, Any], where: str = "clip.") -> tuple[int, int]:
    """Check a CLIP tower's spec (see ``clip.ClipTower``).

    Returns:
        The number of blocks of its vision part, and of patches on a side.

    Raises:
        ConfigError: See ``check_config``.
    """
    library = spec.get("library", "transformers")
    if not isinstance(library, str) or library not in CLIP:
        raise ConfigError(f"Unknown CLIP library {_show(library)}; use {' or '.join(CLIP)}.")
    check(spec, CLIP[library], where)
    vision = spec["vision"]
    ours = library == "transformers"
    width, heads = ("hidden_size", "num_attention_heads") if ours else ("width", "heads")
    parts = [spec["vision"], spec.get("text") or {}]
    counts = [part.get(heads, 1) for part in parts]
    if not ours:
        counts[0] = max(1, vision["width"] // vision.get("head_width", 64))
    grid = vision["image_size"] // vision["patch_size"]
    faults = {
        f"{counts} heads do not divide the widths of its parts": any(
            part.get(width, 0) % count for part, count in zip(parts, counts, strict=True)
        ),
        "vision.patch_size is larger than its image_size": not grid,
    }
    _refuse(faults, where)
    return vision["num_hidden_layers" if ours else "layers"], grid


def check_llama(fields: Mapping[str, Any], where: str = "") -> None:
    """Check a language model's fields. Raises as ``check_config``."""
    check(fields, LLAMA, where)
    heads, words = fields.get("num_attention_heads", 32), fields.get("vocab_size", 32_000)
    keys, pad = fields.get("num_key_value_heads") or heads, fields.get("pad_token_id")
    faults = {
        f"{heads} heads do not divide hidden_size": fields.get("hidden_size", 4096) % heads != 0,
        f"{keys} heads of keys do not divide {heads} heads": heads % keys != 0,
        f"pad_token_id {pad} is no word of {words}": pad is not None and not -1 <= pad < words,
    }
    _refuse(faults, where)


def check_explainer(fields: Mapping[str, Any], words: int) -> None:
    """Check an explainer's own fields, beside a language model of so many words.

    Raises:
        ConfigError: See ``check_config``.
    """
    check(fields, _EXPLAINER)
    places = [fields.get("image_token_id", -200), fields.get("deepfake_token_id", -300)]
    wrong = places[0] == places[1] or any(0 <= place < words for place in places)
    _refuse({f"image_token_id and deepfake_token_id are {places}, words or equal": wrong}, "")
