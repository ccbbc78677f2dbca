"""Of which species a list of genes is, by its names alone: Ensembl prefixes, genome prefixes, and how symbols are written."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Ensembl's prefixes of gene ids, https://www.ensembl.org/info/genome/stable_ids/prefixes.html
_ENSEMBL = {
    "": "homo_sapiens",
    "MUS": "mus_musculus",
    "RNO": "rattus_norvegicus",
    "MMU": "macaca_mulatta",
    "MFA": "macaca_fascicularis",
    "PTR": "pan_troglodytes",
    "CJA": "callithrix_jacchus",
    "SSC": "sus_scrofa",
    "BTA": "bos_taurus",
    "OAR": "ovis_aries",
    "ECA": "equus_caballus",
    "CAF": "canis_lupus_familiaris",
    "FCA": "felis_catus",
    "OCU": "oryctolagus_cuniculus",
    "GAL": "gallus_gallus",
    "XET": "xenopus_tropicalis",
    "DAR": "danio_rerio",
}
_GENOMES = {
    "hg19": "homo_sapiens",
    "hg38": "homo_sapiens",
    "grch37": "homo_sapiens",
    "grch38": "homo_sapiens",
    "mm10": "mus_musculus",
    "mm39": "mus_musculus",
    "grcm38": "mus_musculus",
    "grcm39": "mus_musculus",
}
# FlyBase and WormBase ids, which Ensembl takes over.
_OWN_IDS = {"FBgn": "drosophila_melanogaster", "WBGene": "caenorhabditis_elegans"}
_ID = re.compile(r"ENS([A-Z]*)G\d{11}(\.\d+)?")
_OWN_ID = re.compile(r"(FBgn|WBGene)\d{7,8}")
_GENOME = re.compile(r"(hg19|hg38|GRCh37|GRCh38|mm10|mm39|GRCm38|GRCm39)_+", re.IGNORECASE)
# Cd3d, Gm1234, H2-Aa, 2610301B20Rik, mt-Nd1. C1orf112 is human: HGNC writes "orf" small.
_MOUSE_LIKE = re.compile(
    r"[A-Z][a-z][a-z0-9.-]*|[A-Z][a-z0-9]*[a-z][A-Za-z0-9.-]*|H2-[A-Z]+[a-z0-9]*|\d{7}[A-Z]\d\dRik|mt-[A-Z][a-z0-9]+"
)
_OPEN_FRAME = re.compile(r"C(\d+|X|Y)orf\d+")
_UPPER = re.compile(r"[A-Z][A-Z0-9.@-]*")
# Names that only mouse genes have: a list with many of them in capitals was a mouse's before somebody changed its case.
_ONCE_MOUSE = re.compile(r"GM\d{4,5}|\d{7}[A-Z]\d\dRIK")
RODENTS = ("mus_musculus", "rattus_norvegicus")
MAJORITY = 0.5
ONCE_MOUSE_SHARE = 0.02
"""A fifth of GENCODE's mouse genes are called so, and no human gene is."""

N_LOOKED_AT = 5_000
"""Azimuth looks at as many names to tell the type of ids."""


@dataclass(frozen=True)
class SpeciesGuess:
    """What the names of genes say about the species."""

    guess: str | None
    """Latin name with an underscore; None where the names do not tell."""

    share: float
    """Names that speak for it, of those that were looked at."""

    evidence: tuple[str, ...]
    """What was seen, in sentences."""

    excluded: tuple[str, ...] = ()
    """Species that it cannot be, of those that the writing of symbols tells apart."""

    def contradicts(self, species: str) -> bool:
        """Whether the names speak for another species than this one."""
        if species in self.excluded:
            return True
        is_by_id = self.guess is not None and not self.excluded
        return is_by_id and self.guess != species and species in KNOWN


KNOWN = frozenset({*_ENSEMBL.values(), *_OWN_IDS.values()})
"""Species that can be guessed."""


def guess_species(genes: Sequence[str]) -> SpeciesGuess:
    """The species that most names speak for, and why.

    Args:
        genes: names as sent. Of more than 5,000 that many are looked at, spread evenly.

    Returns:
        The guess. Ids and genome prefixes name a species; capitals are how human genes are written and many others, so that they
        exclude mouse and rat only, and a capital with small letters after it excludes human.
    """
    step = max(1, -(-len(genes) // N_LOOKED_AT))
    looked_at = genes[::step]
    by_id: Counter[str] = Counter()
    capitalised, upper, once_mouse = [], [], []
    example: dict[str, str] = {}
    for name in looked_at:
        if found := _species_of_id(name):
            by_id[found] += 1
            example.setdefault(found, name)
        elif _OPEN_FRAME.fullmatch(name) or _UPPER.fullmatch(name):
            upper.append(name)
            if _ONCE_MOUSE.fullmatch(name):
                once_mouse.append(name)
        elif _MOUSE_LIKE.fullmatch(name):
            capitalised.append(name)
        elif _ONCE_MOUSE.fullmatch(name):
            once_mouse.append(name)
    n = max(1, len(looked_at))
    evidence = [
        f"{number / n:.0%} of the names are ids or carry a prefix of {species} ({example[species][:40]})"
        for species, number in by_id.most_common(3)
    ]
    if capitalised:
        evidence.append(
            f"{len(capitalised) / n:.0%} are written as mouse and rat symbols are ({', '.join(capitalised[:3])})"
        )
    if upper:
        evidence.append(f"{len(upper) / n:.0%} are written in capitals, as human symbols are ({', '.join(upper[:3])})")
    if len(once_mouse) / n >= ONCE_MOUSE_SHARE:
        evidence.append(
            f"{len(once_mouse) / n:.0%} are names that only mouse genes have, in capitals ({', '.join(once_mouse[:3])}): "
            "changing the case of a symbol does not make an ortholog of it"
        )
    told = tuple(evidence)
    if by_id:
        species, number = by_id.most_common(1)[0]
        if number / n > MAJORITY:
            return SpeciesGuess(species, number / n, told)
    if len(capitalised) / n > MAJORITY:
        return SpeciesGuess("mus_musculus", len(capitalised) / n, told, ("homo_sapiens",))
    if len(once_mouse) / n >= ONCE_MOUSE_SHARE and len(upper) / n > MAJORITY:
        return SpeciesGuess("mus_musculus", len(once_mouse) / n, told, ("homo_sapiens",))
    if len(upper) / n > MAJORITY:
        return SpeciesGuess("homo_sapiens", len(upper) / n, told, RODENTS)
    return SpeciesGuess(None, 0.0, told)


def _species_of_id(name: str) -> str | None:
    if match := _ID.fullmatch(name):
        return _ENSEMBL.get(match[1], f"another species (ENS{match[1]}…)")
    if match := _OWN_ID.fullmatch(name):
        return _OWN_IDS[match[1]]
    if match := _GENOME.match(name):
        return _GENOMES[match[1].lower()]
    return None
