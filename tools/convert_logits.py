"""The logits part of `convert.py verify`: a folder's model in transformers and a checkpoint's here, in fp32.

A release with code of its own is compared with the model of transformers that has its sizes and weights: InternLM2 is
a Llama whose q, k and v are one matrix. That code itself is not run.

Shapes: S tokens, V words, N frames.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamed.checkpoint import rewrite
from megamed.checkpoint.hf.convert import Folder
from megamed.checkpoint.on_demand import Unwrapped
from megamed.checkpoint.state import weights_state
from megamed.checkpoint.weights import Weights, fill_state
from megamed.data import Document, FrameRef, pack
from megamed.models.families import INTERNVL
from megamed.models.families.internvl.config import write_config
from megamed.models.language import AttentionConfig, build_language_chunks
from megamed.models.vlm import FrameEncoder
from megamed.models.weight_map import to_theirs
from megamed.parallel import VisionPhase, run_schedule
from megamed.utils import UserError
from megamed.utils.optional import require

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def differences(
    folder: Folder, checkpoint: Path, image: Path | None, text: str
) -> Iterator[tuple[str, int, float]]:
    """What was compared, how many logits, and the largest absolute difference: with a picture, and without.

    Raises:
        UserError: the picture cannot be read, or transformers is missing.
    """
    words = words_of(folder, text)
    pixels_NCHW = picture(image, folder.model.vision.image_size)
    theirs = their_model(folder)
    for what, frames_NCHW in (("logits, picture and text", pixels_NCHW), ("logits, text alone", pixels_NCHW[:0])):
        num_visual = len(frames_NCHW) * tokens_per_frame(folder)
        ours_SV = our_logits(folder, checkpoint, words, frames_NCHW, num_visual)
        ids = torch.tensor([[theirs.config.image_token_id] * num_visual + words])
        extra = {"pixel_values": frames_NCHW} if len(frames_NCHW) else {}
        with torch.no_grad():
            theirs_SV = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0]
        yield what, ours_SV.numel(), float((ours_SV - theirs_SV).abs().max())


def tokens_per_frame(folder: Folder) -> int:
    """Visual tokens of a frame."""
    from megamed.models.projector import tokens_per_frame as of_sizes

    vision = folder.model.vision
    return of_sizes(vision.image_size, vision.patch_size, folder.model.projector.downsample_ratio)


def words_of(folder: Folder, text: str) -> list[int]:
    """Numbers of the text's tokens; without a tokenizer of the model any numbers do."""
    limit = folder.model.language.vocab_size - 1  # the last one stands for a visual token below
    path = folder.path / "tokenizer.json"
    try:
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    except Exception:  # tokenizers raises nothing more particular; a file may lack, or be in another format
        ids = list(text.encode())
    return [number % limit for number in ids]


def picture(image: Path | None, size: int) -> Tensor:
    """A picture as a frame [1, 3, size, size], as ImageNet is normalised."""
    from PIL import Image

    if image is None:
        import pydicom
        from pydicom.data import get_testdata_file

        path = get_testdata_file("CT_small.dcm", download=False)
        values = pydicom.dcmread(str(path)).pixel_array.astype(np.float32)
        values = 255 * (values - values.min()) / (values.max() - values.min())
        opened = Image.fromarray(values.astype(np.uint8))
    else:
        try:
            opened = Image.open(image)
            opened.load()
        except OSError as error:
            raise UserError(f"--image {image}: cannot be read ({error})") from error
    pixels = np.asarray(opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    return torch.from_numpy((pixels - MEAN) / STD).float().permute(2, 0, 1)[None].contiguous()


def their_model(folder: Folder) -> Any:
    """The folder's model in transformers."""
    transformers = require("transformers", "verify", "pip install -c constraints.txt transformers")
    kind = transformers.InternVLForConditionalGeneration
    if folder.family is INTERNVL:
        return kind.from_pretrained(folder.path, dtype=torch.float32, local_files_only=True).eval()
    config = write_config(folder.model, folder.model.language.vocab_size - 1, "float32")
    with torch.device("meta"):
        model = kind(transformers.InternVLConfig(**config))
    names = [name for name, _ in model.named_parameters()]
    table = INTERNVL.table(folder.model, config["text_config"]["model_type"], names)
    incoming, ours = folder.incoming, {}
    for theirs in folder.source.names:
        found = folder.table.of_theirs(theirs)
        if found is not None and found.ours not in ours:
            ours[found.ours] = whole(incoming, found.ours)
    weights = fuse(to_theirs(table, ours), names)
    model.load_state_dict(weights, strict=False, assign=True)
    if lacking := [name for name, x in model.named_parameters() if x.is_meta]:
        raise UserError(f"{folder.path}: transformers' model has {lacking[0]}, which was made of nothing")
    rebuild_buffers(model)
    model.tie_weights()
    return model.eval()


def whole(incoming: Any, name: str) -> Tensor:
    """One of our parameters, fp32."""
    found = incoming.table.of_ours(name)
    rows = [incoming.source.shape(theirs) for theirs in found.theirs]
    join = found.line.joined(sum(shape[0] for shape in rows))
    out = torch.empty(join.num_rows(), *rows[0][1:])
    incoming.fill(name, len(out), (0,) * out.dim(), out)
    return out


def fuse(weights: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Experts as modules of transformers 5 have them, one tensor for all of a layer."""
    result = dict(weights)
    for name in names:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            layer = name.rpartition(".")[0]
            count = sum(1 for other in weights if other.startswith(f"{layer}.") and other.endswith("down_proj.weight"))
            parts = [
                torch.cat([weights[f"{layer}.{e}.{part}.weight"] for part in parts_of(name)]) for e in range(count)
            ]
            result[name] = torch.stack(parts)
    return result


def parts_of(name: str) -> tuple[str, ...]:
    """What a fused tensor of experts is made of."""
    return ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)


def rebuild_buffers(model: Any) -> None:
    """Frequencies of RoPE, which follow from the configuration, in the place of those on the meta device."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)


def our_logits(folder: Folder, checkpoint: Path, words: list[int], frames_NCHW: Tensor, num_visual: int) -> Tensor:
    """The checkpoint's logits [S, V]."""
    model = folder.model
    with rewrite.one_process() as mesh:
        chunks = build_language_chunks(model.language, AttentionConfig(), mesh, torch.float32)
        encoder = FrameEncoder(model.vision, model.projector)
        fill_state(Weights(checkpoint), weights_state(chunks, encoder, mesh), lambda tensor: True)
        vision = Unwrapped(encoder)
        language = [Unwrapped(chunk) for chunk in chunks]
        for part in (*language, vision):
            part.eval().requires_grad_(False)
        document = Document(
            "verify", [0] * num_visual + words, [0] * (num_visual + len(words)), list(range(num_visual)),
            [FrameRef(0, len(frames_NCHW), i) for i in range(len(frames_NCHW))],
        )  # fmt: skip
        row = pack([document], len(document.tokens), 0)
        phase = VisionPhase(
            vision, mesh, tokens_per_frame(folder), model.language.hidden_size, torch.float32,
            frames_per_pass=1, frames_in_flight=None,
        )  # fmt: skip
        with torch.no_grad():
            rows = phase.forward([row], lambda frames: frames_NCHW[: len(frames)], keep_graph=False)
            inputs = phase.language_inputs([row], rows)
            (logits_SV,) = run_schedule(
                language, inputs, lambda output, item: (output.new_zeros(()), output[0]), False, train=False  # type: ignore[arg-type]
            )
    return logits_SV[:, : model.language.vocab_size].float()
