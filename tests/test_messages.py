"""Parts of error messages."""

import pytest

from tta.messages import nearest, plain, require


@pytest.mark.parametrize(
    ("word", "hint"), [("tnet", " Did you mean 'tent'?"), ("sar", " Did you mean 'sar'?"), ("xyz", "")]
)
def test_the_nearest_name_is_offered(word, hint):
    assert nearest(word, ["tent", "sar", "cotta"]) == hint
    assert nearest(word, iter(())) == ""


def test_require_says_what_was_given_and_expected():
    require(True, "lr=1", "anything")
    with pytest.raises(ValueError, match=r"^Got lr=0; expected a rate above 0\.$"):
        require(False, "lr=0", "a rate above 0")


def test_characters_that_would_not_be_seen_stand_as_their_codes():
    assert plain("a\x1b[2J\n\u202eb\x9b\u2028\ud800") == r"a\x1b[2J\n\u202eb\x9b\u2028\ud800"
    assert plain("a\nb\r", lines=True) == "a\nb\\r"
    assert plain("Käse 図 😀 C:\\x") == "Käse 図 😀 C:\\x"
