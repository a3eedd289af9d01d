"""CLIP's two transformers in the layout of its published weights."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), which CLIP was trained with in the place of GELU.

    Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)", arXiv 2016.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A residual block of attention and two linear layers, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Blocks one after another."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ImageTower(nn.Module):
    """A ViT: normalised images (batch, 3, size, size) -> features (batch, features), not of unit length.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.

    Args:
        size: side of the images, in pixels.
        patch: side of the patches.
        width: of the tokens.
        depth: number of blocks.
        heads: of the attention; they divide the width.
        features: width of what comes out.
    """

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, features: int) -> None:
        super().__init__()
        self.image_size = size
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width) * width**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, depth, heads)
        self.proj = nn.Parameter(torch.randn(width, features) * width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # type: ignore[no-any-return]


class TextTower(nn.Module):
    """A causal transformer: token ids (texts, length) -> features (texts, features), read at the end of each text.

    The end is the largest id. What follows it is never read, so that texts need no more padding than the longest of them.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.

    Args:
        words: number of token ids.
        length: most tokens of a text.
        width: of the tokens.
        depth: number of blocks.
        heads: of the attention; they divide the width.
        features: width of what comes out.
    """

    def __init__(self, words: int, length: int, width: int, depth: int, heads: int, features: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width) * 0.01)
        self.transformer = Transformer(width, depth, heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, features) * width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        ahead = torch.full((length, length), -torch.inf, device=ids.device, dtype=x.dtype).triu(1)
        x = self.ln_final(self.transformer(x, ahead))
        return x[torch.arange(len(ids), device=ids.device), ids.argmax(1)] @ self.text_projection  # type: ignore[no-any-return]


class CLIP(NamedTuple):
    """The parts of a CLIP with a ViT: the two towers, and the logarithm of the factor between cosines and logits.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
    """

    image: ImageTower
    text: TextTower
    logit_scale: Tensor

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], heads: tuple[int, int] | None = None) -> "CLIP":
        """Make the towers of published weights, float32; sizes are those of the weights.

        Args:
            weights: as OpenAI's and open_clip's files name them.
            heads: of the image and of the text tower; if left out one for every 64 of the width, as in all that OpenAI
                published. The weights do not tell: with a wrong number the features are wrong.

        Raises:
            ValueError: the weights are not those of a CLIP with a ViT.
        """
        needed = ("visual.conv1.weight", "visual.proj", "text_projection", "token_embedding.weight", "logit_scale")
        if missing := [name for name in needed if name not in weights]:
            raise ValueError(
                f"These are no weights of a CLIP with a ViT in OpenAI's layout: {', '.join(missing)} missing."
            )
        own = {name: value.float() for name, value in weights.items() if name not in OF_A_FILE}
        of_image = {name.removeprefix("visual."): v for name, v in own.items() if name.startswith("visual.")}
        of_text = {name: v for name, v in own.items() if not name.startswith("visual.") and name != "logit_scale"}
        width, _, patch, _ = of_image["conv1.weight"].shape
        words, text_width = of_text["token_embedding.weight"].shape
        of_heads = heads or (width // 64, text_width // 64)
        size = patch * round((len(of_image["positional_embedding"]) - 1) ** 0.5)
        image = ImageTower(size, patch, width, _depth(of_image), of_heads[0], of_image["proj"].shape[1])
        length = len(of_text["positional_embedding"])
        text = TextTower(words, length, text_width, _depth(of_text), of_heads[1], of_text["text_projection"].shape[1])
        image.load_state_dict(of_image)
        text.load_state_dict(of_text)
        return cls(image.eval(), text.eval(), own["logit_scale"])


OF_A_FILE = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in OpenAI's files, beside the weights


def _depth(weights: Mapping[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("transformer.resblocks."))
