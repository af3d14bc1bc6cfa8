"""Which functions of which .cu file are compiled with which defines, and which architectures can't have them.

The compile test builds every row for every architecture; a launcher takes its defines from here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One compilation: the file, a function in it, the defines; and the instructions that it can't do without.

    least: the lowest compute capability (major, minor). only: the one architecture whose instructions it is made of.
    """

    file: str
    function: str
    defines: tuple[tuple[str, int | str], ...] = ()
    least: tuple[int, int] = (7, 5)
    only: str | None = None
    why: str = ""

    def refusal(self, architecture: str) -> str | None:
        """Why this can't be compiled for an architecture such as "sm_75", or None."""
        if self.only is not None and architecture != self.only:
            return f"{self.file} is made for {self.only} alone: {self.why}"
        major, minor = divmod(int(architecture.removeprefix("sm_").rstrip("a")), 10)
        if (major, minor) < self.least:
            return f"{self.file} needs compute capability {self.least[0]}.{self.least[1]}: {self.why}"
        return None


WNA16: tuple[Variant, ...] = ()
INT8: tuple[Variant, ...] = ()
VARIANTS: tuple[Variant, ...] = (*WNA16, *INT8)
