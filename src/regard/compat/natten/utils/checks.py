"""The check that modules written for NATTEN call on their own arguments."""

from ..arguments import check_all_args

__all__ = ["check_all_args"]
