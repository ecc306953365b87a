"""Codes of the DICOM standard that the reader knows: classes of objects, transfer syntaxes, words of a header.

UIDs are those of PS3.6, Annex A. A word that is not listed here never leaves the header.
"""

from __future__ import annotations

import hashlib
from typing import Literal

# What an object is to this reader.
#   stack       slices with a place in the patient
#   projection  one X-ray picture
#   photo       one picture taken in visible light
#   ultrasound  what a sonographer keeps: frames with text burnt into them, as a rule
#   capture     a picture of a screen or of a film
ObjectKind = Literal["stack", "projection", "photo", "ultrasound", "capture"]

_STORAGE = "1.2.840.10008.5.1.4.1.1."
CT, MR, PT, NM = (_STORAGE + end for end in ("2", "4", "128", "20"))
ENHANCED = {_STORAGE + end for end in ("2.1", "2.2", "4.1", "4.4", "130", "128.1")}
KINDS: dict[str, ObjectKind] = {
    **dict.fromkeys((CT, MR, PT, NM, *ENHANCED), "stack"),
    **dict.fromkeys(
        # CR, DX, mammography, intra-oral (for presentation and for processing), XA, RF.
        (_STORAGE + end for end in ("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1", "12.1", "12.2")),
        "projection",
    ),
    **dict.fromkeys(
        # Endoscopic, microscopic, slide-coordinates, photographic, ophthalmic 8 and 16 bit, dermoscopic.
        (_STORAGE + end for end in ("77.1.1", "77.1.2", "77.1.3", "77.1.4", "77.1.5.1", "77.1.5.2", "77.1.7")),
        "photo",
    ),
    **dict.fromkeys((_STORAGE + end for end in ("3", "3.1", "6", "6.1", "6.2", "6.3")), "ultrasound"),
    **dict.fromkeys((_STORAGE + end for end in ("7", "7.1", "7.2", "7.3", "7.4")), "capture"),
}
ENDOSCOPIC = _STORAGE + "77.1.1"

# Objects without pixels to look at, by the start of their class: what they are.
NOT_IMAGES = {
    "1.2.840.10008.1.3.10": "a DICOMDIR, an index of other files",
    _STORAGE + "88.": "a structured report",
    _STORAGE + "104.": "a document (PDF, CDA or STL)",
    _STORAGE + "11.": "a presentation state",
    _STORAGE + "481.": "an object of radiotherapy (dose, plan or structures)",
    _STORAGE + "66.": "a segmentation, registration or surface",
    _STORAGE + "66": "raw data",
    _STORAGE + "67": "real-world value mapping",
    _STORAGE + "68.": "a surface scan",
    _STORAGE + "9.": "a waveform",
    _STORAGE + "4.2": "MR spectroscopy",
    _STORAGE + "30": "a parametric map",
    _STORAGE + "78.": "measurements of the eye",
    _STORAGE + "79.": "measurements of the eye",
    _STORAGE + "80.": "measurements of the eye",
    _STORAGE + "131": "an object of implant planning or a procedure log",
    "1.2.840.10008.5.1.4.34.": "an object of radiotherapy (dose, plan or structures)",
    "1.2.840.10008.5.1.4.38.": "a hanging protocol",
    "1.2.840.10008.5.1.4.39.": "a colour palette",
    "1.2.840.10008.5.1.4.43.": "an implant template",
}
# Their modalities, for objects without a class.
NOT_IMAGE_MODALITIES = {
    "SR", "PR", "KO", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SEG", "REG", "DOC", "ECG", "AU", "PLAN",
}

IMPLICIT, EXPLICIT, DEFLATED, BIG = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".1.99", ".2"))
NATIVE = {IMPLICIT, EXPLICIT, DEFLATED, BIG}
RLE = "1.2.840.10008.1.2.5"
_JPEG_FAMILY = "1.2.840.10008.1.2.4."
JPEG = {_JPEG_FAMILY + end for end in ("50", "51", "57", "70")}
JPEG_LS = {_JPEG_FAMILY + end for end in ("80", "81")}
# JPEG 2000 (ISO 15444-1) and High-Throughput JPEG 2000 (ISO 15444-15).
JPEG_2000 = {_JPEG_FAMILY + end for end in ("90", "91", "201", "202", "203")}
SUPPORTED = NATIVE | {RLE} | JPEG | JPEG_LS | JPEG_2000

MODALITIES = {
    "CT", "MR", "PT", "NM", "CR", "DX", "MG", "IO", "PX", "XA", "RF", "US", "OT", "ES", "GM", "SM", "XC", "OP", "DMS",
    "OPT", "IVUS", "IVOCT", "SC", "BI", "DG", "TG", "RG",
}

# Body Part Examined: PS3.16, Annex L, the short codes; with them the spellings that scanners write most.
BODY_PARTS = set(
    """ABDOMEN ABDOMENPELVIS ADRENAL ANKLE ANUS AORTA APPENDIX ARM AXILLA BACK BLADDER BRAIN BREAST BRONCHUS BUTTOCK
    CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CIRCLEOFWILLIS CLAVICLE COCCYX
    COLON CORNEA CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FINGER
    FOOT GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY KNEE LARYNX LEG LIVER
    LSPINE LSSPINE LUNG MANDIBLE MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE
    ORBIT OVARY PANCREAS PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE RECTUM RIB SCALP SCAPULA SCLERA SCROTUM
    SHOULDER SIJOINT SINUS SKULL SPINE SPLEEN SSPINE STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THUMB THYMUS THYROID
    TLSPINE TMJ TOE TONGUE TRACHEA TSPINE UPRSPINE URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA""".split()
)

# View Position: of radiography and, in the second line, of mammography (CID 4014).
VIEWS = set(
    """AP PA LL RL LLD RLD LLO RLO LAT LATERAL LAO RAO LPO RPO OBLIQUE AXIAL SWIMMERS SUNRISE
    CC MLO ML LM LMO FB SIO ISO XCC XCCL XCCM AT CV RL RM RI RS ID AXL CCID""".split()
)

# Words of ImageType that may name a part of a series.
IMAGE_TYPES = set(
    """M P R I ND NORM DIS2D DIS3D M_FFE M_SE M_IR M_TSE M_B0 M_B1 P_FFE P_SE P_B0 R_FFE R_SE I_FFE I_SE FFE SE IR TSE
    MAGNITUDE PHASE REAL IMAGINARY MIXED ADC EADC TRACEW TRACE FA DIFFUSION TENSOR ASL PERFUSION CBF CBV MTT TTP
    ORIGINAL DERIVED PRIMARY SECONDARY DIXON WATER FAT W F IP OP IN_PHASE OUT_PHASE OPP_PHASE PHASE_MAP VELOCITY
    FLOW MIP MINIP MPR CSAPARALLEL AXIAL LOCALIZER PROJECTION AVERAGE OTHER T1 T2 T2_STAR R2 R2_STAR B0 B1 FMRI
    MEAN SUM SUB RECON VOLUME""".split()
)

# RescaleType and Units (PS3.3, C.11.1.1.2 and C.8.9.1.1.3), as `SeriesInfo.units` has them.
UNITS = {
    "HU": "HU", "BQML": "Bq/ml", "GML": "g/ml", "CM2ML": "cm2/ml", "CNTS": "counts", "CPS": "counts/s",
    "PROPCNTS": "counts", "PROPCPS": "counts/s", "OD": "OD", "HU_MOD": "HU", "MGML": "mg/ml", "UMOLML": "umol/ml",
    "MLMING": "ml/min/g", "MLG": "ml/g", "1CM": "1/cm", "PCT": "percent", "STDDEV": "standard deviations",
}


def known_word(word: str) -> str:
    """A word of ImageType, or a few digits that tell it from others where it could say anything."""
    return word if word in IMAGE_TYPES or word.isdigit() else hashlib.sha256(word.encode()).hexdigest()[:4]
