"""Energy and emissions of a run, by the formula of the LLaMA paper (arXiv:2302.13971 section 6).

Wh = device-hours x W x PUE,   tCO2eq = MWh x 0.385
"""

PUE = 1.1  # power usage effectiveness of the data centre
KG_PER_KWH = 0.385  # US average


def kwh(device_hours: float, watts: float) -> float:
    return device_hours * watts * PUE / 1000


def kg_co2(device_hours: float, watts: float) -> float:
    return kwh(device_hours, watts) * KG_PER_KWH
