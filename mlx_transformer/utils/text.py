"""Numbers and nouns in sentences."""


def clock(seconds: float) -> str:
    """Write a duration: "0:08", "12:34", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def plural(count: int, noun: str) -> str:
    """Write a count and its noun: "1 document", "2,000 documents", "3 stories"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{count:,} {noun}s"
