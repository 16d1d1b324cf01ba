"""Parity: does an engine compute what was simulated, and a machine what another machine computed?"""
