"""Vision-language models: an image tower, a text tower, and the names of classes between them."""

from tta.towers.clip import CLIP, ImageTower, TextTower
from tta.towers.prompts import Prompts
from tta.towers.two_towers import CLIP_LOGIT_SCALE, TEMPLATE, TwoTowers, prompts_of, towers_of
from tta.towers.words import WordTokenizer

__all__ = [
    "CLIP",
    "CLIP_LOGIT_SCALE",
    "TEMPLATE",
    "ImageTower",
    "Prompts",
    "TextTower",
    "TwoTowers",
    "WordTokenizer",
    "prompts_of",
    "towers_of",
]
