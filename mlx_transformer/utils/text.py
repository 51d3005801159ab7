"""Numbers and nouns in sentences."""


def plural(count: int, noun: str) -> str:
    """Write a count and its noun: "1 document", "2,000 documents", "3 stories"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{count:,} {noun}s"
