"""Codes other than the released table: members of the family of residual quantizers, chosen by `quantizer@model.quantizer`."""
