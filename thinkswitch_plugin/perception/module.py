"""The perception module of ATM (arXiv 2404.09170): a soft prompt computed from the question.

Learnable queries attend over the question's token embeddings; what they find, and a few
features of the question's text, becomes the embeddings of placeholder tokens in the prompt.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from thinkswitch_plugin.args import PerceptionKeys
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception.private import KeepsType

MAX_WIDTH = 256  # of the attention and the MLP: the table of a 4 B model would make them 80 M parameters


class Perception(KeepsType):
    """Token embeddings and features of a question -> the embeddings of its soft prompt.

    Weights are plain parameters and not `nn.Linear`: axolotl's `lora_target_linear` would put
    LoRA on layers inside the module, and bitsandbytes would quantize them. They stay in float32
    whatever type the model is cast to, under autocast too.
    """

    def __init__(self, hidden: int, keys: PerceptionKeys, scale: float = 0.02) -> None:
        """Random weights.

        Args:
            hidden: size of the model's token embeddings.
            keys: `thinkswitch.perception` of a recipe.
            scale: standard deviation of the embedding table; soft prompts start with the same.

        Raises:
            ThinkSwitchError: the heads do not divide the module's width.
        """
        super().__init__()
        self.keys, self.hidden = keys, hidden
        self.width = min(hidden, MAX_WIDTH)
        # Half of the variance is the prompt that all questions share, half depends on the question.
        part = scale if keys.static else scale / math.sqrt(2)
        self.prompt = _normal(part, keys.tokens, hidden)
        if keys.static:
            return
        inputs = 0
        if keys.cross_attention:
            if self.width % keys.heads:
                raise ThinkSwitchError(
                    f"`thinkswitch.perception.heads: {keys.heads}` does not divide the module's width {self.width}; "
                    "choose a divisor."
                )
            self.query = _normal(1.0, keys.queries, self.width)
            self.key = _normal(1 / math.sqrt(hidden), self.width, hidden)
            self.value = _normal(1 / math.sqrt(hidden), self.width, hidden)
            inputs += keys.queries * self.width
        if keys.features:
            self.feature = _normal(1.0, self.width, len(keys.features))
            self.feature_bias = _normal(math.pi, self.width)
            inputs += self.width
        self.inner = _normal(1 / math.sqrt(inputs), self.width, inputs)
        self.inner_bias = nn.Parameter(torch.zeros(self.width))
        self.outer = _normal(part / math.sqrt(self.width), keys.tokens * hidden, self.width)

    def forward(self, embeddings: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """The soft prompts of a batch of questions.

        Args:
            embeddings: (questions, longest, hidden), right-padded token embeddings.
            mask: (questions, longest), true where there is a token; at least one a question.
            features: (questions, features), as `features.read` gives them.

        Returns:
            (questions, tokens, hidden) in float32.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            if self.keys.static:
                return self.prompt.expand(len(embeddings), -1, -1)
            found = []
            if self.keys.cross_attention:
                attended = self._attend(embeddings.float(), mask)
                found.append(functional.layer_norm(attended, attended.shape[1:]))
            if self.keys.features:
                # Waves of unit variance (random Fourier features), which keep small differences of a number apart.
                angle = functional.linear(features.float(), self.feature, self.feature_bias)
                found.append(math.sqrt(2) * angle.cos())
            inputs = torch.cat(found, dim=-1)
            inner = functional.gelu(functional.linear(inputs, self.inner, self.inner_bias))
            # The unit scale that the output weights are made for.
            outer = functional.linear(functional.layer_norm(inner, (self.width,)), self.outer)
            return self.prompt + outer.view(-1, self.keys.tokens, self.hidden)

    def _attend(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """What the queries find: (questions, queries * width)."""
        # Token embeddings are of the order 0.02; attention wants the order 1, and their order in the question.
        inputs = functional.rms_norm(embeddings, (self.hidden,)) + _positions(mask, self.hidden)
        heads, batch, longest = self.keys.heads, *mask.shape
        queries = self.query.view(1, -1, heads, self.width // heads).transpose(1, 2).expand(batch, -1, -1, -1)
        keys, values = (
            functional.linear(inputs, weight).view(batch, longest, heads, -1).transpose(1, 2)
            for weight in (self.key, self.value)
        )
        found = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None, :])
        return found.transpose(1, 2).reshape(batch, -1)


def _normal(std: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


def _positions(mask: Tensor, hidden: int) -> Tensor:
    """Sinusoidal positions (arXiv 1706.03762, 3.5), (questions, longest, hidden), counted from the question's end.

    The question is at the end of a prompt, whatever its length.
    """
    place = mask.sum(1, keepdim=True) - mask.cumsum(1)
    half = (hidden + 1) // 2
    rate = torch.exp(torch.arange(half, device=mask.device) * (-math.log(10_000.0) / half))
    angle = place[..., None] * rate
    return torch.cat((angle.sin(), angle.cos()), dim=-1)[..., :hidden]
