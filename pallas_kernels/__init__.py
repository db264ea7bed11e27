"""Paged attention over a pool of KV pages, as functions from arrays to arrays."""

from pallas_kernels.contents import PageContents, export_pages, import_pages
from pallas_kernels.merge import merge_states
from pallas_kernels.ops import copy_pages, paged_attention, read_pages, write_pages
from pallas_kernels.pages import Pages, init_pages, page_bytes
from pallas_kernels.reference import AttentionResult
from pallas_kernels.sharing import Sharing, check_sharing, find_groups

__all__ = [
    "AttentionResult",
    "PageContents",
    "Pages",
    "Sharing",
    "check_sharing",
    "copy_pages",
    "export_pages",
    "find_groups",
    "import_pages",
    "init_pages",
    "merge_states",
    "page_bytes",
    "paged_attention",
    "read_pages",
    "write_pages",
]
