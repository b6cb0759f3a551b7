"""Two texts compared, and a text in one line."""


def in_one_line(text: str) -> str:
    """A text with escapes for line ends and all else that is not printed: what stands in a user's
    file must not move a terminal's cursor, and an error is one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, in characters.

    These are the fewest insertions, deletions and substitutions that make b of a.
    """
    row = list(range(len(b) + 1))       # from a's first i characters to b's first j
    for i, x in enumerate(a, 1):
        diagonal = row[0]
        row[0] = i
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = min(above + 1, row[j - 1] + 1, diagonal + (x != y))
            diagonal = above
    return row[-1]
