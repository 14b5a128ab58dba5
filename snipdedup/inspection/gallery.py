"""The page of ``snip search``: what was found, as tiles, with nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from snipdedup.inspection.report import cut, safe_link
from snipdedup.inspection.report_page import TEMPLATES, environment

KEY, CAPTION, QUERY = 120, 600, 200  # characters shown


def page(index: str, how: str, queries: list[dict[str, Any]], measure: str) -> str:
    """Return the page.

    Parameters
    ----------
    index : str
        Name of the index.
    how : str
        What was compared.
    queries : list of dict
        As the command's JSON holds them; their texts are a stranger's.
    measure : str
        The name of the score in ``queries``.
    """
    styles = (TEMPLATES / "report.css").read_text("utf-8")
    return (
        environment()
        .get_template("search.html.j2")
        .render(
            policy=policy(styles),
            styles=styles,
            index=index,
            how=how,
            answers=[
                {
                    "query": cut(query["query"], QUERY),
                    "row": tile(query["row"], measure) if query["row"] else None,
                    "neighbours": [tile(row, measure) for row in query["neighbours"]],
                }
                for query in queries
            ],
        )
    )


def policy(styles: str) -> str:
    """Return the content security policy: this style, and nothing else."""
    style = base64.b64encode(hashlib.sha256(styles.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"


def tile(row: dict[str, Any], measure: str) -> dict[str, str]:
    """Return a row as the template takes it: texts cut, and a link only where it is one."""
    url, score = row["url"] or "", row.get(measure)
    return {
        "row": f"{row['row']:,}",
        "shard": row["shard"],
        "shard_row": f"{row['shard_row']:,}",
        "key": cut(row["key"] or "", KEY),
        "caption": cut(row["caption"] or "", CAPTION),
        "url": cut(url, CAPTION),
        "link": safe_link(url),
        "score": "" if score is None else f"{score:.4f}",
    }
