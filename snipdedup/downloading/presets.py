"""Sets that people ask for by name: where they are, and what became of upstream's."""

from __future__ import annotations

from pathlib import Path

from snipdedup.errors import SnipError

SETS = {
    "datacomp_small": "hf://datasets/mlfoundations/datacomp_small",
    "datacomp_1b": "hf://datasets/mlfoundations/datacomp_1b",
    "relaion2B-en-research-safe": "hf://datasets/laion/relaion2B-en-research-safe",
}
CLOSED = ("laion2b-en", "laion2b-en-vit-h-14-embeddings")
OPEN = (
    "Open, with CLIP features: snip download datacomp_small OUT --embeddings (12.8 M rows), or "
    "datacomp_1b; gated by a form: relaion2B-en-research-safe (2.1 G rows, without features)"
)
UPSTREAM_MASK = (
    "https://huggingface.co/datasets/fraisdufour/snip-dedup/resolve/main/"
    "is_dup_mlp_1024_128_gelu_snn_2layer_notext.npy"
)
LAION = (
    "laion2B-en and its embeddings are disabled on the hub and cannot be fetched any more. "
    f"{OPEN}. If you hold a copy of the metadata of laion2b-en-vit-h-14-embeddings, upstream's "
    f"published mask works on it by position: fetch {UPSTREAM_MASK}, then snip filter METADATA "
    "--is_dup is_dup_mlp_1024_128_gelu_snn_2layer_notext.npy --out OUT [--start 0 --end 10]. It "
    "does not fit Re-LAION by position: join by url, snip filter RELAION --is_dup MASK --on url "
    "--keys METADATA"
)


def resolve(source: str) -> str:
    """Return the source that a name stands for; any other source as it is.

    Raises
    ------
    SnipError
        If the set cannot be fetched any more.
    """
    if Path(source).expanduser().exists():  # a folder of that name is what is meant
        return source
    name = source.removeprefix("hf://datasets/laion/").lower()
    if name in CLOSED:
        raise SnipError(LAION)
    return next((place for known, place in SETS.items() if known.lower() == name), source)
