"""The XLA implementation: what a CPU runs, and any platform without a kernel."""

from pallas_kernels.reference import copy_pages, paged_attention, refusal, write_pages

__all__ = ["copy_pages", "paged_attention", "refusal", "write_pages"]
