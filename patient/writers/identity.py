"""Who and what a DICOM file is about: the patient's and the study's attributes, copied from its source or removed."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patient.readers.common import optional
from patient.readers.dicom.files import text
from utils.version import VERSION

MANUFACTURER, MODEL = "MedGS", "render.py"
# The attributes of DICOM's modules Patient, General Study, Patient Study and Clinical Trial (PS3.3 C.7.1 to C.7.2)
# that are copied, where the source has them. Those of type 2 are written empty where it has not.
_TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyID",
)
_TYPE_3 = (
    "IssuerOfPatientID",
    "TypeOfPatientID",
    "OtherPatientIDs",
    "PatientBirthTime",
    "PatientSpeciesDescription",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "LongitudinalTemporalInformationModified",
    "StudyDescription",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialProtocolName",
    "ClinicalTrialSiteID",
    "ClinicalTrialSiteName",
    "ClinicalTrialSubjectID",
    "ClinicalTrialSubjectReadingID",
    "ClinicalTrialTimePointID",
    "ClinicalTrialTimePointDescription",
)
_SPACE = uuid.UUID("6f3b0a52-5b1c-4a6e-9a35-3f1de2c0a7d4")  # of replaced UIDs


@dataclass(frozen=True)
class Identity:
    """Turns what a source says of patient and study into what a new file may say.

    anonymous: names, numbers, dates and descriptions are left out, and UIDs replaced: the same UID by the same one in
    every file, so that files of a case still belong together.
    """

    anonymous: bool = False

    def uid(self, original: str) -> str:
        """The UID that stands for one of the source's."""
        if not self.anonymous:
            return original
        return f"2.25.{uuid.uuid5(_SPACE, original).int}"

    def describe(self, source: Any, target: Any) -> None:
        """Give the dataset `target` the patient and the study of the dataset `source`."""
        for keyword in _TYPE_2:
            setattr(target, keyword, "" if self.anonymous else _clean(source, keyword))
        target.StudyInstanceUID = self.uid(text(source, "StudyInstanceUID") or _derived(source, "study"))
        if self.anonymous:
            target.PatientName = target.PatientID = "Anonymous"
            target.PatientIdentityRemoved = "YES"
            target.DeidentificationMethod = f"{MANUFACTURER} {VERSION} --anonymous"
            return
        for keyword in _TYPE_3:
            if text(source, keyword):
                setattr(target, keyword, _clean(source, keyword))

    def frame_of_reference(self, source: Any) -> str:
        """UID of the frame of reference; one of the series' own where the source has none."""
        return self.uid(text(source, "FrameOfReferenceUID") or _derived(source, "frame of reference"))

    def event(self, source: Any) -> str:
        """UID of the irradiation event, likewise."""
        return self.uid(text(source, "IrradiationEventUID") or _derived(source, "irradiation"))


def _derived(source: Any, what: str) -> str:
    """A UID for what a source should have one for, the same each time."""
    return f"2.25.{uuid.uuid5(_SPACE, what + text(source, 'SeriesInstanceUID')).int}"


def series_uid(source: Any, identity: Identity) -> str:
    """UID of the source's series."""
    return identity.uid(text(source, "SeriesInstanceUID") or _derived(source, "series"))


def new_uid() -> str:
    return f"2.25.{uuid.uuid4().int}"


def equipment(target: Any) -> None:
    """Say what made the file."""
    target.Manufacturer, target.ManufacturerModelName = MANUFACTURER, MODEL
    target.SoftwareVersions = target.DeviceSerialNumber = VERSION


def series_number(source: Any, offset: int) -> int:
    """A series number beside the source's: 3 gives 301, 302, ..."""
    told = text(source, "SeriesNumber")
    return (int(told) if told.isdecimal() and int(told) < 10_000_000 else 0) * 100 + offset


def _clean(source: Any, keyword: str) -> Any:
    """The value of an attribute, empty where it is not one that DICOM allows: readers and writers refuse those."""
    pydicom = optional("pydicom", "pydicom", "writing DICOM")
    try:
        value = source.get(keyword)
    except Exception:  # damaged text raises whatever it meets
        return ""
    if value is None:
        return ""
    kind = pydicom.datadict.dictionary_VR(keyword)
    if kind == "SQ":
        return value
    if kind == "CS":
        allowed = {"PatientSex": ("M", "F", "O")}.get(keyword)
        return value if allowed is None or value in allowed else ""
    if kind == "PN":
        return str(value)  # decoded: the new file has a character set of its own
    checks: dict[str, Callable[[str], object]] = {"DA": pydicom.valuerep.DA, "TM": pydicom.valuerep.TM}
    if kind in checks:
        try:
            checks[kind](str(value))
        except ValueError:
            return ""
    return value
