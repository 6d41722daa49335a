"""Words that scale, negate, limit or doubt a number, or add another one: beside such a word it is not that number."""

import re

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# More numbers, and words that multiply, divide or group. Each may have a plural s.
_SCALES = """
    thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    hundred thousand million billion trillion quadrillion mil mln bln mio mrd lakh crore grand gross score myriad
    dozen couple duo trio triplet quartet quintet brace decade century centuries millennium millennia
    kilo mega giga tera milli micro nano centi deci hecto basis bp ppm ppb permille percent pct
    half halve quarter double twice thrice doubled tripled quadrupled halved quartered fold
    squared cubed factorial reciprocal inverse inverted complement conjugate reversed backward
    recurring repeating repeated rounded truncated raised increased decreased reduced subtract subtracted added divided
    hundert tausend million millionen milliarde milliarden milliard millone milioni mille mila dutzend docena douzaine
""".split()
# third, twelfths, thousandth
_ORDINALS = "third|[a-z]*(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred|thousand|illion)th"
# What is counted in `12 ordered pairs`, a scale in `6 pairs`; and nouns that scale in the singular alone.
_TUPLES = r"(?<!ordered )(?<!possible )(?<!distinct )(?<!different )(?<!such )(?<!valid )(?:pair|triple|quadruple)s?"
_SINGULAR = "root|multiple"
# Words that deny a number, put bounds on it, say that it was guessed, or that it is of another sign.
_DOUBTS = """
    not no nope never neither nor none without except excluding but minus negative negated opposite plus
    about around approx approximately roughly nearly almost barely hardly circa near thereabouts estimate estimated est
    guess guessed say assume assumed suppose supposed supposedly hopefully presumably apparently allegedly
    maybe perhaps probably possibly likely unlikely uncertain unsure think believe may might could should would must
    unless if when wrong incorrect false untrue impossible invalid unknown unclear undefined rejected fails ruled
    more less fewer greater larger smaller higher lower least most than under over below beneath beyond exceeding
    extra additional missing short shy deficit debt loss owed overdrawn odd something tops max
    too ish maximum minimum between other instead otherwise remainder mod modulo
    isn't isnt aren't arent wasn't wasnt cannot can't cant don't dont
    nicht kein keine pas non etwa rund environ presque casi quasi quase weniger mehr moins menos meno
""".split()
_DOUBT_BEFORE = rf"(?<![\\A-Za-z])(?:{'|'.join(_DOUBTS)})"
QUALIFIER = re.compile(
    rf"{_DOUBT_BEFORE}(?![A-Za-z])"
    rf"|(?<![\\A-Za-z])(?:(?:{'|'.join([*NUMBERS, *_SCALES])}|{_ORDINALS})s?|{_TUPLES}|{_SINGULAR}|halves"
    r"|up to|at (?:best|worst)|times(?= [A-Za-z])"
    r"|(?:and|or)(?: |\W+text\W+)(?:up|down|above|below|more|less|fewer|greater|higher|lower|larger|smaller|so)"
    r")(?![A-Za-z])",
    re.IGNORECASE,
)
DOUBT = re.compile(rf"{_DOUBT_BEFORE}(?![A-Za-z])", re.IGNORECASE)
