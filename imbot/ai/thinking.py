"""What a model thinks before it answers: taken out of the text of the answer.

It comes first, between tags of which the opening may be missing, and the closing if the
answer was cut. Tags that are quoted later belong to the answer.
"""

from __future__ import annotations

import re

_NAMES = r"(?:(?:mm:)?think|thinking|thoughts?)"
# Harmony, of OpenAI's open models, names the channel of each text.
_HARMONY = r"(?:<\|start\|>\w*)?<\|channel\|>"
_FINAL = rf"(?:<\|end\|>)?{_HARMONY}final[^<]*<\|message\|>"
_OPENINGS = {  # how thinking begins, and how this kind of it ends
    rf"<{_NAMES}>": rf"</{_NAMES}>",
    r"\[THINK\]": r"\[/THINK\]",
    rf"{_HARMONY}(?!final)[^<]*<\|message\|>": r"<\|end\|>|(?=<\|start\|>)",
    r"<details[^>]*>\s*<summary>\s*Thinking[^<]*</summary>": "</details>",  # Dify
}
_BEGINS = re.compile("|".join(rf"\s*({opening})" for opening in _OPENINGS))
_ENDS = [re.compile(closing) for closing in _OPENINGS.values()]
_LONE = re.compile(rf"\s*(?:</{_NAMES}>|\[/THINK\]|{_FINAL})")
# It begins with one class of characters: so the search for it is quick.
_TAG = re.compile(
    rf"[<\[](?:((?<=<)/{_NAMES}>|(?<=\[)/THINK\]|(?<=<)\|(?:end\|><\|)?"
    rf"(?:start\|>\w*<\|)?channel\|>final[^<]*<\|message\|>)|"
    rf"(?<=<){_NAMES}>|(?<=\[)THINK\])\s{{0,9}}"
)
_QUOTES = " \t`'\"“‘「『《（([*"  # before a tag that is quoted
# An end of a text that may go on as a tag, as the space after one, or as an emoji.
_OPEN = re.compile(
    rf"(?:<[/a-z:]{{0,9}}|(?:<\|(?!message\|>)\w*\|?>?\w{{0,10}}){{1,5}}|\[/?[THINK]{{0,5}}|"
    rf"(?:</?{_NAMES}>|\[/?THINK\])\s{{0,8}}|[\ud800-\udbff])\Z"
)
_HALF = re.compile(r"\s*<details[^>]*(?:>\s*(?:<[^/]*)?)?\Z")
_BLANK = re.compile(r"\s*")
_PICTURE = re.compile(
    r"!?\[[^]\n]{0,99}\]\(\s{0,9}data:image/[^)\s]*(?:\)|\Z)|"
    r"data:image/[\w.+-]+;base64,[\w+/=]*"
)


def visible(text: str, final: bool = True) -> str:
    """Return what users see of an answer: no thinking, "[picture]" for a picture's
    bytes; if the answer goes on, no half of a tag either."""
    text = text if final else text[:-99] + _OPEN.sub("", text[-99:])
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    start = end = _after_thoughts(text, 0, final)
    while (tag := _TAG.search(text, end)) and tag[1]:
        end = tag.end()
        if text[tag.start() - 1] not in _QUOTES or "\n" in tag[0]:
            start = end = _after_thoughts(text, end, final)
    text = text[start:]
    if text.endswith("|>"):
        text = re.sub(r"(?:<\|(?:end|return)\|>)+\Z", "", text)
    return _PICTURE.sub("[picture]", text) if "data:image/" in text else text


def _after_thoughts(text: str, place: int, final: bool) -> int:
    """Return where what follows the thoughts at this place begins."""
    while True:
        if lone := _LONE.match(text, place):
            place = lone.end()
        elif begins := _BEGINS.match(text, place):
            ends = _ENDS[(begins.lastindex or 1) - 1].search(text, begins.end())
            if not ends:
                rest = text[begins.end() :]  # an answer may speak of the tag
                speaks = final and rest.startswith(" ") and "\n" not in rest
                return place if speaks else len(text)
            place = ends.end()
        elif not final and _HALF.match(text, place):
            return len(text)
        else:
            return place and _BLANK.match(text, place).end()  # type: ignore[union-attr]
