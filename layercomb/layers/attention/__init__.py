"""Attention: functions of arrays, and the layers around them."""
