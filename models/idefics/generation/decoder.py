"""One prompt read, then one token at a time: what greedy, sampled and beam generation share.

A step runs the decoder on the new tokens alone. Text keys and values are written into buffers that were made
large enough at the start; images were projected while the prompt was read, and a step reads only those that
its tokens look at, so images nobody looks at cost nothing.

Legend: B prompts, R = B * copies rows, T tokens of the prompt, K tokens so far, N images a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionLayout
from ..cache import FocusedImages, IdeficsCache, StaticCache
from ..image_context import ImageContext
from .protocol import GeneratingModel


class Decoder:
    """A prompt being continued.

    Args:
        model: The model.
        input_ids: [B, T].
        attention_mask: [B, T] or None; padding may stand on either side.
        images: ``pixel_values`` (or embeddings) and ``image_attention_mask``, as the model takes them.
        max_length: K at most.
        use_cache: Without, every step reads the whole sequence again.
        static: Keep every shape the same from step to step.
        compiled: How to compile the step (``torch.compile`` arguments), or None; needs ``static``.
        embeds: [B, T, C], read instead of ``input_ids``, which may then be [B, 0].
        position_ids: [B, T] of the prompt, from whose last one the rest is counted on; None counts them from the mask.
        past: Cache of a part of the prompt at its beginning.
        keep_all: Leave a cache behind that goes on with any of the images, at the cost of steps that look for theirs.
        want_states, want_weights: Collect hidden states and attentions of every step.
    """

    def __init__(
        self,
        model: GeneratingModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        images: dict[str, Any],
        max_length: int,
        *,
        use_cache: bool = True,
        static: bool = False,
        compiled: dict[str, Any] | None = None,
        embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Any = None,
        keep_all: bool = False,
        want_states: bool = False,
        want_weights: bool = False,
    ) -> None:
        self.model, self.max_length = model, max_length
        self.batch, self.length = input_ids.shape if embeds is None else embeds.shape[:2]
        self.copies, self.embeds = 1, embeds
        self.want_states, self.want_weights = want_states, want_weights
        self.states: list[Any] = []
        self.attentions: list[Any] = []
        self.general = past is not None or want_states or want_weights or (keep_all and not static)
        if static and (past is not None or want_states or want_weights):
            raise ValueError(
                "cache_implementation='static' takes no past_key_values and returns neither hidden states nor "
                "attentions; use 'dynamic'."
            )
        if past is not None and not use_cache:
            raise ValueError("past_key_values came with use_cache=False; leave one of them out.")
        self.static, self.compiled, self.use_cache = static, compiled, use_cache
        self.images = dict(images)
        seen = self.images.get("image_attention_mask")
        if seen is not None and not bool(seen.any()):
            self.images = {}  # nothing is looked at: this is text
        real = (
            input_ids.new_ones(self.batch, self.length, dtype=torch.bool)
            if attention_mask is None
            else attention_mask.bool()
        )
        if not bool(real.any(1).all()):
            raise ValueError("attention_mask hides a whole prompt; give every row at least one token.")
        self.real = real
        self.padded = not bool(real.all())
        self.last = self.length - 1 - real.flip(1).int().argmax(1)  # place of each row's last real token
        self.prompt_positions = position_ids
        if position_ids is None:
            self.positions = real.sum(1, keepdim=True)  # of the next token, [B, 1]
        else:
            self.positions = position_ids.gather(1, self.last[:, None]) + 1
        self.cache: IdeficsCache | None = None
        if past is not None:
            self.cache = IdeficsCache.of(past)
            if not self.cache.get_seq_length() <= int(self.last.min()):
                raise ValueError(
                    f"past_key_values holds {self.cache.get_seq_length()} tokens and the prompt has {self.length}; "
                    "give the whole prompt, of which at least the last token is not in the cache."
                )
        self.context: ImageContext | None = None
        self.ids = input_ids

    def prefill(self) -> Tensor:
        """Read the prompt and return the logits [B, V] of what follows it."""
        rows = torch.arange(self.batch, device=self.ids.device)
        past = 0 if self.cache is None else self.cache.get_seq_length()
        if self.cache is None and self.use_cache:
            self.cache = IdeficsCache(self.model.config.num_hidden_layers, capacity=self.max_length)
            if not self.general:
                # Padding on the right is not what new tokens continue: they see what the last real token saw.
                self.cache.keep_images_of = self.last
        seen = self.images.get("image_attention_mask")
        images = dict(self.images)
        if seen is not None and past:
            images["image_attention_mask"] = seen[:, past:]
        text = (
            {"input_ids": self.ids[:, past:]}
            if self.embeds is None
            else {"inputs_embeds": self.embeds[:, past:]}
        )
        output = self._read(
            **text,
            attention_mask=self.real if self.padded else None,
            position_ids=None if self.prompt_positions is None else self.prompt_positions[:, past:],
            past_key_values=self.cache,
            use_cache=self.use_cache,
            skip_unseen_images=self.use_cache and not self.general,
            **images,
        )
        if self.cache is None and seen is not None:
            self._keep_images(output.image_hidden_states, seen.bool()[rows, self.last])
        if self.general and self.cache is not None and self.cache.images is not None and seen is not None:
            self.cache.images.seen.copy_(seen.bool()[rows, self.last])
        return self.model.lm_head(output.last_hidden_state[rows, self.last - past])

    def _read(self, **inputs: Any) -> Any:
        """The model's forward pass, with what is collected of it."""
        output = self.model.model(
            output_attentions=self.want_weights,
            output_hidden_states=self.want_states,
            return_dict=True,
            **inputs,
        )
        if self.want_states:
            self.states.append(output.hidden_states)
        if self.want_weights:
            self.attentions.append(output.attentions)
        return output

    def expand(self, copies: int) -> None:
        """Go on with ``copies`` rows for each prompt, which share the prompt's images."""
        self.copies = copies
        for kept in (self.states, self.attentions):
            kept[:] = [tuple(layer.repeat_interleave(copies, 0) for layer in step) for step in kept]
        self.positions = self.positions.repeat_interleave(copies, 0)
        self.real = self.real.repeat_interleave(copies, 0)
        if self.cache is not None:
            self.cache.expand(copies, self.max_length)
        elif self.images:
            self.images = {
                name: value.repeat_interleave(copies, 0) if isinstance(value, Tensor) else value
                for name, value in self.images.items()
            }

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue what row ``rows[i]`` of the same prompt has been until now."""
        if self.cache is not None:
            self.cache.reorder(rows, self.length)

    def step(self, ids: Tensor, produced: int) -> Tensor:
        """Logits [R, V] after ids [R, T + produced], of which only the last column is new to the cache."""
        if self.cache is None:
            return self._reread(ids)
        token = ids[:, -1:]
        if self.general:
            counted = None if self.prompt_positions is None else self.positions + produced - 1
            output = self._read(
                input_ids=token, position_ids=counted, past_key_values=self.cache, use_cache=True
            )
            return self.model.lm_head(output.last_hidden_state[:, -1])
        if self.context is None:
            self._begin()
        assert self.context is not None
        if isinstance(self.cache, StaticCache):
            return self._step(token, self.positions, self.cache, self.context)
        x = self.model.model.embed_tokens(token)
        mask = self.mask[:, None, None, : self.length + produced] if self.padded else None
        layout = AttentionLayout(mask, False)
        x, _, _ = self.model.model.decode(x, self.positions, layout, self.context, self.cache)
        self.positions = self.positions + 1
        return self.model.lm_head(x[:, -1])

    def branches(self, ids: Tensor, depth: Tensor, owner: Tensor) -> Tensor:
        """Logits [B, M, V] after each token of several continuations of the prompt, read side by side.

        The cache is left as it was: further branches can be read.

        Args:
            ids: int64 [M], tokens of the continuations one after the other.
            depth: int64 [M], place of each within its continuation.
            owner: int64 [M], which continuation it belongs to; it sees none of the others.
        """
        if self.context is None:
            self._begin()
        assert self.cache is not None
        assert self.context is not None
        count = len(ids)
        x = self.model.model.embed_tokens(ids.expand(self.batch, -1))
        own = (owner[:, None] == owner) & (depth[:, None] >= depth)  # [M, M]
        prompt = self.mask[:, None, : self.length].expand(-1, count, -1)
        mask = torch.cat((prompt, own.expand(self.batch, -1, -1)), -1)[:, None]
        context = self.context
        if context.focused is not None and context.focused.row_mask is not None:
            row_mask = context.focused.row_mask.expand(-1, count)
            context = replace(context, focused=replace(context.focused, row_mask=row_mask))
        places = self.length + depth
        keys = torch.cat((torch.arange(self.length, device=ids.device), places))
        layout = AttentionLayout(mask, False, places=(places, keys))
        x, _, _ = self.model.model.decode(x, self.positions + depth, layout, context, self.cache)
        for layer in self.cache.layers:
            layer.length = self.length
        return self.model.lm_head(x)

    def _begin(self) -> None:
        """Lay out what the steps read, once the prompt is read and rows are copied."""
        assert self.cache is not None
        rows = self.batch * self.copies
        self.mask = self.real.new_ones(rows, self.max_length)
        self.mask[:, : self.length] = self.real
        focus = self.cache.focus
        focused = FocusedImages([], None, None) if focus is None else focus.result(self.copies)
        self.context = ImageContext(1 if focus is None else focus.length, focused=focused)
        if self.static:
            self.cache = StaticCache.adopt(self.cache, self.max_length, self.mask)
            self._step = self._static_step
            if self.compiled is not None:
                self._step = torch.compile(
                    self._static_step, **{"fullgraph": True, "dynamic": False, **self.compiled}
                )

    def _static_step(
        self, token: Tensor, positions: Tensor, cache: StaticCache, context: ImageContext
    ) -> Tensor:
        """A step in which no shape, and no number Python sees, changes."""
        x = self.model.model.embed_tokens(token)
        assert cache.key_mask is not None
        places = torch.arange(cache.max_length, device=token.device)
        mask = (places <= cache.position)[None] & cache.key_mask
        layout = AttentionLayout(mask[:, None, None], False)
        x, _, _ = self.model.model.decode(x, positions, layout, context, cache)
        cache.position.add_(1)
        positions.add_(1)
        return self.model.lm_head(x[:, -1])

    def _reread(self, ids: Tensor) -> Tensor:
        new = ids.shape[1] - self.ids.shape[1]
        real = torch.cat((self.real, self.real.new_ones(len(ids), new)), 1)
        text = {"input_ids": ids}
        if self.embeds is not None:
            written = self.model.model.embed_tokens(ids[:, self.ids.shape[1] :])
            text = {"inputs_embeds": torch.cat((self.embeds.repeat_interleave(self.copies, 0), written), 1)}
        images = dict(self.images)
        if images:
            images["image_attention_mask"] = torch.cat(
                (
                    images["image_attention_mask"].bool(),
                    self.seen.repeat_interleave(self.copies, 0)[:, None].expand(-1, new, -1),
                ),
                1,
            )
        counted = self.prompt_positions
        if counted is not None:
            further = self.positions + torch.arange(new, device=ids.device)
            counted = torch.cat((counted.repeat_interleave(self.copies, 0), further), 1)
        output = self._read(
            **text,
            attention_mask=real if self.padded else None,
            position_ids=counted,
            use_cache=False,
            **images,
        )
        return self.model.lm_head(output.last_hidden_state[:, -1])

    def _keep_images(self, states: Tensor, seen: Tensor) -> None:
        """Without a cache the encoded images are still kept, though they are projected at every step."""
        form = "perceiver_embeddings" if self.model.config.use_resampler else "image_encoder_embeddings"
        mask = self.images["image_attention_mask"]
        self.images = {form: states, "image_attention_mask": mask}
        self.seen = seen
