"""What is minimised: the packed next-token loss, the alignment of latents with the decoder's own embeddings, and beside
the first the unpack loss (`unpacking.py`) and the divergence from the decoder that reads the full text (`teaching.py`).

`TrainedPair` computes them behind one `forward`, as distributed wrappers want it. Losses are sums over a row; the loop
divides by what the whole step has, on all processes, so that the split of a step into rows changes nothing.
Shape legend: T decoder rows of a packed row, n rows with a label, S and m the teacher's, N latents, D decoder width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.errors import ConfigError
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.markers import MarkerIds
from utils.model.packed_attention import supports_packed_attention, use_packed_attention
from utils.model.splice import splice_spans
from utils.model.transfer import to_device
from utils.model.windows import plan_windows
from utils.training.lora import acting_on
from utils.training.rows import PackedRow
from utils.training.teaching import TeacherRow
from utils.training.unpacking import Unpacker

# Room for the float32 logits that exist at the same time; a vocabulary is large. What does not fit is computed in
# pieces, each a second time on the way back, so a device with more memory takes larger ones.
_HEAD_BYTES = {"cpu": 1 << 29, "cuda": 1 << 31}


class MarkerRows(nn.Module):
    """What training adds to the decoder's embedding rows of the two markers around a span.

    The table itself stays frozen: two rows need no gradient and no optimiser state of the whole vocabulary. The third
    marker, the placeholder, is never looked up: latents stand in its place.
    """

    def __init__(self, markers: MarkerIds, width: int) -> None:
        super().__init__()
        self.ids = (markers.start, markers.end)
        # Beside the weights on their device: a list would be copied there row after row.
        self.ids_on_device: torch.Tensor
        self.register_buffer("ids_on_device", torch.tensor(self.ids), persistent=False)
        self.delta = nn.Parameter(torch.zeros(len(self.ids), width))

    def forward(self, ids_T: torch.Tensor, embeds_TD: torch.Tensor) -> torch.Tensor:
        """Embeddings with the rows of markers changed."""
        for row, marker in enumerate(self.ids):
            here_T1 = (ids_T == marker).unsqueeze(-1)
            embeds_TD = embeds_TD + torch.where(here_T1, self.delta[row].to(embeds_TD.dtype), 0.0)
        return embeds_TD

    def add_to_logits(self, hidden_nD: torch.Tensor, logits_nV: torch.Tensor) -> None:
        """Change the logits of the same rows, in place, for a head that is the table itself."""
        change = F.linear(hidden_nD, self.delta.to(hidden_nD.dtype)).to(logits_nV.dtype)
        logits_nV.index_add_(1, self.ids_on_device, change)


class TrainedPair(nn.Module):
    """A pair as it is trained.

    Args:
        model: The pair; its parts become parts of this module under the same names.
        markers: Ids of the marker tokens.
        unpack: Whether to have an unpacker, for the unpack loss.
        head_rows: Label rows whose logits exist at the same time; None: by vocabulary and device.

    Raises:
        ConfigError: The decoder cannot run packed rows.
    """

    def __init__(
        self, model: CodeLLaVAModel, markers: MarkerIds, *, unpack: bool = False, head_rows: int | None = None
    ) -> None:
        super().__init__()
        if not supports_packed_attention(model.decoder):
            raise ConfigError(f"{type(model.decoder).__name__} cannot run packed rows, which training needs")
        self.memory_encoder = model.memory_encoder
        self.decoder = model.decoder
        width = model.decoder.get_input_embeddings().weight.shape[1]
        self.marker_rows = MarkerRows(markers, width)
        self.unpacker = Unpacker(width, self._encoder_table().shape[1]) if unpack else None
        self._head_rows = head_rows
        use_packed_attention(self.decoder)

    @property
    def head_rows(self) -> int:
        """Label rows whose logits exist at the same time."""
        if self._head_rows is not None:
            return self._head_rows
        table = self.decoder.get_output_embeddings().weight
        return max(1, _HEAD_BYTES.get(table.device.type, _HEAD_BYTES["cpu"]) // (4 * table.shape[0]))

    def forward(self, row: PackedRow, align: bool = False, unpack: bool = False) -> torch.Tensor:
        """The summed loss of a packed row: over its labels, or with `align` over its memory tokens.

        With more losses a vector of that; with `unpack` the unpack loss, summed over the memory tokens that it covers;
        and for a row with a teacher the divergence from it, summed over the labels that it gives right, and the weight
        of these labels. On a GPU nothing here waits for the device: what is known beforehand is reckoned on the host.
        """
        row = row.to(self.decoder.get_input_embeddings().weight.device)
        if align:
            return self._align_loss(row)
        latents = self.latents(row)
        hidden_nD = self.label_states(row, latents)
        losses = [self._cross_entropy(hidden_nD, row.labels, row.label_weights)]
        if unpack:
            assert self.unpacker is not None
            losses.append(self.unpacker(latents, row.spans, self._encoder_table()))
        if row.teacher is not None:
            losses += self._teacher_losses(hidden_nD, row, row.teacher)
        return losses[0] if len(losses) == 1 else torch.stack(losses)

    def latents(self, row: PackedRow) -> list[torch.Tensor]:
        """Of each span; those that share an encoding are encoded together."""
        if not row.shared:
            return self.memory_encoder(row.spans)
        latents: list[torch.Tensor] = [torch.empty(0)] * len(row.spans)
        together = self.memory_encoder.at_several_sizes([[row.spans[n] for n in group] for group in row.shared])
        for group, of_group in zip(row.shared, together, strict=True):
            for number, latent in zip(group, of_group, strict=True):
                latents[number] = latent
        return latents

    def _encoder_table(self) -> torch.Tensor:
        return self.memory_encoder.chunker.encoder.get_input_embeddings().weight

    def label_states(self, row: PackedRow, latents: list[torch.Tensor]) -> torch.Tensor:
        """Last hidden states of the rows with a label, [n, D]."""
        embeds_TD = self.decoder.get_input_embeddings()(row.input_ids)
        embeds_TD = self.marker_rows(row.input_ids, embeds_TD)
        embeds_TD = splice_spans(embeds_TD, latents, row.spans)
        hidden_TD = self.decoder.get_decoder()(
            inputs_embeds=embeds_TD[None],
            position_ids=row.position_ids[None],
            segments=row.segments,
            use_cache=False,
        ).last_hidden_state[0]
        # Only rows with a label need logits: most rows of a task example have none.
        return hidden_TD[row.label_rows]

    def logits(self, hidden_nD: torch.Tensor, is_trained_n1: torch.Tensor | None = None) -> torch.Tensor:
        """[n, V] float32; of rows that are not trained, without what training added to the markers' rows."""
        head = self.decoder.get_output_embeddings()
        logits_nV = head(hidden_nD)
        if head.weight is self.decoder.get_input_embeddings().weight:
            hidden_nD = hidden_nD if is_trained_n1 is None else hidden_nD * is_trained_n1
            self.marker_rows.add_to_logits(hidden_nD, logits_nV)
        return logits_nV.float()

    def _cross_entropy(self, hidden_nD: torch.Tensor, labels_n: torch.Tensor, weights_n: torch.Tensor) -> torch.Tensor:
        def part(hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            # Not a matrix product, which autocast would take in bfloat16.
            return (F.cross_entropy(self.logits(hidden), labels, reduction="none") * weights).sum()

        return _summed(part, (hidden_nD, labels_n, weights_n), self.head_rows)

    def _teacher_losses(self, hidden_nD: torch.Tensor, row: PackedRow, teacher: TeacherRow) -> list[torch.Tensor]:
        """The divergence KL(teacher, decoder) summed over the labels that the teacher gives right, and their weight."""
        taught_mD, is_trained_m1, right_m = self.read_text(teacher)
        weights_n = row.label_weights * right_m[teacher.label_of]
        inputs = [hidden_nD, taught_mD[teacher.label_of], weights_n]
        inputs += [] if is_trained_m1 is None else [is_trained_m1[teacher.label_of]]

        def part(hidden: torch.Tensor, taught: torch.Tensor, weights: torch.Tensor, *trained: torch.Tensor) -> Any:
            with torch.no_grad():
                wanted = self.logits(taught, *trained).log_softmax(dim=-1)
            found = self.logits(hidden).log_softmax(dim=-1)
            return (F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1) * weights).sum()

        # As many tensors of the vocabulary's width as three cross-entropies have.
        return [_summed(part, inputs, max(1, self.head_rows // 3)), weights_n.sum()]

    @torch.no_grad()
    def read_text(self, teacher: TeacherRow) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The teacher's states at its labels [m, D], which are the trained decoder's [m, 1] or None for all, and where
        the answer that the label belongs to is right [m], 0 or 1."""
        with acting_on(self.decoder, teacher.is_trained):
            hidden_SD = self.decoder.get_decoder()(
                inputs_embeds=self.decoder.get_input_embeddings()(teacher.input_ids)[None],
                position_ids=teacher.position_ids[None],
                segments=teacher.segments,
                use_cache=False,
            ).last_hidden_state[0]
        hidden_mD, trained_m1 = hidden_SD[teacher.label_rows], None
        inputs = [hidden_mD]
        if teacher.is_trained is not None:
            trained_m1 = teacher.is_trained[teacher.label_rows, None]
            inputs.append(trained_m1)
        pieces = zip(*(x.split(self.head_rows) for x in inputs), strict=True)
        greedy_m = torch.cat([self.logits(*piece).argmax(dim=-1) for piece in pieces])
        right = torch.ones(teacher.num_answers, device=hidden_mD.device)
        right = right.scatter_reduce(0, teacher.answers, (greedy_m == teacher.labels).float(), "amin")
        return hidden_mD, trained_m1, right[teacher.answers]

    def _align_loss(self, row: PackedRow) -> torch.Tensor:
        """Squared error between each memory token's latent and the decoder's embedding of the same token.

        In units of the embeddings' variance: 1 is what a constant guess reaches. No decoder pass.
        """
        config = self.memory_encoder.config.with_chunk_size(1)
        windows = [window for span in row.spans for window in plan_windows(span.token_ids, config)]
        with torch.no_grad():
            pooled = torch.cat(self.memory_encoder.chunker(windows))
        latents_ND = self.memory_encoder.adapter(pooled, [window.num_latents for window in windows])
        table_VD = self.decoder.get_input_embeddings().weight
        ids_N = to_device(np.concatenate([window.core for window in windows]).astype(np.int64), table_VD.device)
        wanted_ND = table_VD[ids_N].detach().float()
        variance = wanted_ND.var(dim=0).mean().clamp_min(1e-12)
        return F.mse_loss(latents_ND.float(), wanted_ND, reduction="sum") / variance / wanted_ND.shape[1]


def _summed(part: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], num_rows: int) -> torch.Tensor:
    """The sum of `part` over pieces of at most `num_rows`, each computed again on the way back if there are several."""
    if len(inputs[0]) <= num_rows:
        return part(*inputs)
    pieces = zip(*(x.split(num_rows) for x in inputs), strict=True)
    # Nothing in a piece is random, so there is no state of the generators to keep.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(part, *piece, **settings) for piece in pieces]).sum()


def loss_units(row: PackedRow, align: bool) -> float:
    """What the summed loss of a row is divided by, in the end: its labels' weights, or its memory tokens."""
    return row.memory_tokens if align else float(row.label_weights.sum())  # the row is on the host


def check_alignable(tokenizers: Any) -> None:
    """Raise `ConfigError` unless both tokenizers give a text the same ids, which the align stage rests on."""
    probe = "def area(width, height):\n    return width * height  # naïve é\n"
    encoder, decoder = (
        t(probe, add_special_tokens=False)["input_ids"] for t in (tokenizers.encoder, tokenizers.decoder)
    )
    if encoder != decoder:
        raise ConfigError(
            "the align stage needs an encoder and a decoder with one tokenizer, and these two cut text differently: "
            "leave the stage out"
        )
