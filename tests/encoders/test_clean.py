"""Cleaned captions: word for word those of diffusers' PixArt pipeline, which are those of the released code."""

from __future__ import annotations

import html
import random
import re
import time

import ftfy
import pytest
from bs4 import BeautifulSoup
from bs4.exceptions import ParserRejectedMarkup

from pixart_ds.compat import hide_broken_torchvision
from pixart_ds.encoders.clean import clean_caption

hide_broken_torchvision()
from diffusers import PixArtAlphaPipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")

NASTY = """\
A red circle.
  TWO   spaces\tand a tab
http://example.com/a/b?c=d&e=f a view
https://example.org
https:example
https:/x
http:a http:abc.com http:abc.x.com
see www.shop.com/men?id=123 now
www:abc and www:/abc
shop.co.uk/deals and a.com.b.it/x_y-z/
me@example.com, or x.y@mail.ru.
example.com@here
a.com_b.com
éabc.x.com and -abc.com and ..abc.com
x-http://y and a.b.http://c
U.S. Government.gov.edu.net
it.it is.it
<b>Sunset</b> over the <i>ocean</i>
<p>one<p>two<br/>three
<person> holds <person>
<div><div><div><span>deep</span></div></div></div>
<script>alert("x")</script> a cat
<style>p {color: red}</style> a dog
<!-- hidden --> seen
<!-- never closed
<!DOCTYPE html> page
<?php echo 1 ?> php
<unclosed tag
a < b and c > d
a <3 heart
5<6>4
</closed> only
<a href="http://x.com">link</a>
<img src='a.png' alt="nothing">
Tom & Jerry &amp; friends
&amp;amp; &amp;quot; &ampere
&quot;quoted&quot; and &quot unquoted
&lt;b&gt;escaped&lt;/b&gt;
&#65;&#x42;&#99999999; &#; &#x;
&eacute;&Eacute;&nosuch;&copy &reg;
R&D AT&T Q&A &
&am&quot;p
@nick hello @other_nick's
@ alone
a@b
日本語 and cats
漢字カタカナひらがな
㇀ㇰ㈱㌀㐀䷀一鿿
한국어 고양이
dash – dash — dash ― dash
‐‑‒–—― ⸗ ⸚ ⸻ 〜 〰 ゠ ︱ ︲ ﹘ ﹣ －
one–two—three
«guillemets» “curly” „low‟ ‘single’
`backtick` ´acute´ ¨diaeresis¨
192.168.0.1 is home
1.2.3.4.5.6.7.8
at 3:11
clock 12:30
line\\nbreak
#1 #12 #123 #1234 #12345 #123456
##12 ###
123456 and 12345 and 1234567
IMG_20190312_104523.jpg
photo.png and photo.jpeg photo.webp x.eps y.pdf z.apk v.mp4 w.bmp
.png alone .jpg
a.png.jpg.png x.pngx
''double'' ""double"" '"mixed"'
wait... what.. ....
***SALE*** #SALE# ~now~ [brackets] {braces} (parens) |bars| /slashes\\
®©™•·º½¾¿¡§
word . word . . word
this-is-my-cute-cat
this_is_my_cute_cat_picture
two-part well-known words
cafÃ© â€™quotedâ€™ Ã¼ber
donâ€™t
Ｆｕｌｌ ｗｉｄｔｈ ＴＥＸＴ
ﬁne ﬂow ligatures
jc6640 jc6640vc 6640vc231
abc123 abcd123 ab12
a1b2 a1b2c a1b2c3d4
j2d1a2a 1a2b3c
a1a1_ a1a11é
Free Shipping worldwide
worldwide free shipping worldwide shipping shipping
free download now, download free
click for more, click on this
png image jpg images webp
page 12 of pages 3
640x480 1.5x2 1920×1080 3х4 1x 2.x3. 1x2x3
10x10cm 4x4_
title : subtitle
one,two.three/four
a,b;c:d
"all of it"
'all of it'
"one" and "two"
_starts with
-starts :;,
ends with-
ends with+
.lone
.lone two
...
!!!
?
-
_
+
%
%%%
100% cotton
50%25 off
%2B
one%2Btwo
%252B %25252B
a+b+c
%E2%80%99 %C3%A9
%FF%FE broken
%zz
naïve façade Ünïcödé
İstanbul STRASSE ß
שלום עולם
مرحبا بالعالم
\u202eright to left\u202c
zero\u200bwidth\u200djoiner\ufeff
nul\x00byte
bell\x07 escape\x1b[31mred\x1b[0m
next\x85line para\u2029graph line\u2028sep
no\xa0break\u3000space
soft\xadhyphen
🙂 emoji 👩‍👩‍👧‍👦 family 🏳️‍🌈
e\u0301 combining Å\u030a
٣٤٥ ٣٤٥٦٧٨ digits
²³ ₁₂ ①② Ⅷ
C:\\Users\\me\\cat.jpg
/home/me/cat.png
{"json": "caption", "n": 1}
key=value&other=thing
$19.99 £5 €10 ¥100
1,000,000 people
3.14159265
2021-03-04 12:00:00
+1 (555) 123-4567
ISBN 978-3-16-148410-0
O'Neill's 'n' rock 'n' roll
a.b.c.d.e.f
Vintage 1960's Hand-Painted Vase | Free Shipping
Stock Photo - 123456789
Buy Now! Men’s T-Shirt (Large) – www.shop.com/men?id=123"""
CASES = [
    *NASTY.split("\n"),
    "",
    " ",
    "\n",
    "\n\n a \r\n b \r c",
    " padded  ",
    "at 3:11 ",
    " . ",
    "1:11 \n",
    "a.com   b.com",
    "<b> </b>",
    "word " * 3000,
    "no-end" * 500,
    "the image shows " + "a very, very " * 200 + "long road.",
]

WORDS = """
a x é _ - -- — / \\ @ + % . .. ... : ; , & # < > ( ) [ ] { } | * ~ ® ½ A İ ß 漢 カ 한 🙂 ½ ² " ' '' “ ” ‘ « ` ¨
http:// https: http:a www: www. .com .co .ru .it a.b. @bob me@x.com %2B %20 %E2%80 .png .jpg png image
<b> </b> <p <!-- --> <script> </script> <br/> <person> &amp; &amp &quot; &#65; &lt; &eacute &copy; &a
#12 #1234 #12345 123456 12 1 1.5 2. 640x480 × х jc6640 jc66vc 66vc2 a1b2c3 a1a111_ 1.2.3.4 page download
shipping worldwide free click for on don't â€™ cafÃ© Ａ ﬁ שלום مرحبا ١٢٣ \\n
"""
FRAGMENTS = [
    *WORDS.split(),
    *[" ", " ", "  ", "\t", "\n", " . ", " : ", "3:11 ", "free ", "page 1", "\x00", "\x1b[31m", "\x85", "\xa0", "\u200b", "\u2028"],
]  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> PixArtAlphaPipeline:
    return object.__new__(PixArtAlphaPipeline)  # cleaning needs none of its nets


def fuzzed(seed: int, number: int) -> list[str]:
    random_ = random.Random(seed)
    return ["".join(random_.choices(FRAGMENTS, k=random_.randint(1, 25))) for _ in range(number)]


def test_there_are_a_hundred_nasty_captions_at_least() -> None:
    assert len(set(CASES)) >= 100


@pytest.mark.parametrize("caption", CASES, ids=lambda caption: repr(caption[:30]))
def test_it_cleans_as_diffusers_does(reference: PixArtAlphaPipeline, caption: str) -> None:
    assert clean_caption(caption) == reference._text_preprocessing(caption, clean_caption=True)[0]


def test_it_cleans_any_mixture_of_fragments_as_diffusers_does(reference: PixArtAlphaPipeline) -> None:
    compared = 0
    for caption in fuzzed(1, 1500):
        try:
            expected = reference._text_preprocessing(caption, clean_caption=True)[0]
        except ParserRejectedMarkup:
            continue
        assert clean_caption(caption) == expected, repr(caption)
        compared += 1
    assert compared > 1400


def test_a_second_pass_changes_text_and_so_would_a_third(reference: PixArtAlphaPipeline) -> None:
    assert reference._clean_caption("one%2Btwo") == "one+two"
    assert clean_caption("one%2Btwo") == "one two"
    once = clean_caption("one%2525252Btwo")
    assert (once, clean_caption(once)) == ("one%252btwo", "one+two")


def test_text_that_can_hold_no_markup_would_pass_the_parser_unchanged() -> None:
    texts = [text for text in [*CASES, *fuzzed(2, 1000)] if not re.search("<|&[a-zA-Z#]", text) and text.strip()]
    assert len(texts) > 300
    for text in texts:
        assert BeautifulSoup(text, features="html.parser").text == text


def test_printable_ascii_without_ampersand_needs_no_mending() -> None:
    letters = "".join(chr(code) for code in range(32, 127) if chr(code) != "&")
    random_ = random.Random(3)
    for text in [letters, *("".join(random_.choices(letters, k=60)) for _ in range(300))]:
        assert html.unescape(html.unescape(ftfy.fix_text(text))) == text


def test_markup_that_the_parser_refuses_stays_text() -> None:
    assert clean_caption("a cat <![endif and a dog") == "a cat <! endif and a dog"


@pytest.mark.parametrize(
    "caption",
    [
        "a." * 30_000,
        "a." * 30_000 + "com@",
        "a" * 60_000,
        "a b" + " " * 60_000 + "c",
        "a1a" + "1" * 60_000 + "é",
        "1" * 30_000 + "x" + "1" * 30_000 + "é",
        "-a" * 30_000,
        "http:a" * 10_000,
        "<b>x</b>" * 7_000,
        "日" * 60_000,
    ],
    ids=lambda caption: caption[:6],
)
def test_the_longest_captions_take_no_more_than_their_share_of_time(caption: str) -> None:
    began = time.process_time()
    clean_caption(caption)
    assert time.process_time() - began < 3
