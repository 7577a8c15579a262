"""Codes of structures by their names (SNOMED CT, as DICOM uses it), for the segments of a DICOM file.

Names are those in use: plain English, and the classes of TotalSegmentator. What stands in no line of the table is a
"tissue" with a name, as in 3D Slicer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Code:
    """A coded concept."""

    value: str
    meaning: str
    scheme: str = "SCT"


@dataclass(frozen=True)
class Anatomy:
    """What a segment is."""

    category: Code
    kind: Code
    side: Code | None = None


STRUCTURE = Code("91723000", "Anatomical Structure")
ABNORMAL = Code("49755003", "Morphologically Abnormal Structure")
TISSUE = Code("85756007", "Tissue")
LEFT, RIGHT = Code("7771000", "Left"), Code("24028007", "Right")

# code, meaning: names. Sides are left out of names, unless the code is that of one side.
_STRUCTURES = """
23451007 Adrenal gland: adrenal gland, adrenal, suprarenal gland
4958002 Amygdala: amygdala
15825003 Aorta: aorta
955009 Bronchus: bronchus, bronchi
33626005 Left auricular appendage: atrial appendage left, left atrial appendage
272673000 Bone: bone, bones
12738006 Brain: brain
119238007 Brain Stem: brainstem, brain stem
12691009 Brachiocephalic trunk: brachiocephalic trunk
8887007 Brachiocephalic vein: brachiocephalic vein
76752008 Breast: breast
69105007 Carotid Artery: carotid artery
11000004 Caudate Nucleus: caudate, caudate nucleus
113305005 Cerebellum: cerebellum
40146001 Cerebral Gray Matter: cerebral gray matter, cerebral grey matter
65216001 Cerebrospinal Fluid: cerebrospinal fluid, csf
68523003 Cerebral White Matter: cerebral white matter
71252005 Cervix: cervix
51299004 Clavicle: clavicle, clavicula
71854001 Colon: colon
32062004 Common carotid artery: common carotid artery
73634005 Common iliac artery: iliac artery, common iliac artery
46027005 Common iliac vein: iliac vein, iliac vena, common iliac vein
50016007 Costal Cartilage: costal cartilage, costal cartilages
38848004 Duodenum: duodenum
44947003 Erector spinae muscle: autochthon, erector spinae, erector spinae muscle
32849002 Esophagus: esophagus, oesophagus
81745001 Eye: eye, eyeball
89545001 Face: face
55603005 Fat: fat, adipose tissue
71341001 Femur: femur
87342007 Fibula: fibula
28231008 Gallbladder: gallbladder, gall bladder
181674001 Gluteus maximus muscle: gluteus maximus
78333006 Gluteus medius muscle: gluteus medius
75297007 Gluteus minimus muscle: gluteus minimus
389081007 Gray Matter: gray matter, grey matter
80891009 Heart: heart
8993003 Hepatic vein: hepatic vein, hepatic veins
29836001 Hip: hip
5366008 Hippocampus: hippocampus
85050009 Humerus: humerus
68455001 Iliopsoas muscle: iliopsoas
64131007 Inferior vena cava: inferior vena cava, ivc
64033007 Kidney: kidney, kidneys
14742008 Large intestine: large intestine, large bowel
4596009 Larynx: larynx
66720007 Lateral Ventricle: lateral ventricle, lateral ventricles
82471001 Left atrium: left atrium, atrium left, heart atrium left
49848007 Left Ventricle Myocardium: left ventricle myocardium, lv myocardium
87878005 Left ventricle: left ventricle, ventricle left, heart ventricle left
78076003 Lens: lens
10200004 Liver: liver
90572001 Lower lobe of lung: lower lobe of lung, lung lower lobe
39607008 Lung: lung, lungs
59441001 Lymph Node: lymph node, lymph nodes
91609006 Mandible: mandible
72410000 Mediastinum: mediastinum
74135004 Meniscus: meniscus
72481006 Middle lobe of right lung: lung middle lobe right, middle lobe of right lung, lung middle lobe
71616004 Muscle: muscle, muscles
244453006 Optic chiasm: optic chiasm
18234004 Optic nerve: optic nerve
15497006 Ovary: ovary
15776009 Pancreas: pancreas
45289007 Parotid gland: parotid gland, parotid
64234005 Patella: patella
279706003 Peripheral zone of the prostate: peripheral zone, prostate peripheral zone
54066008 Pharynx: pharynx
78067005 Placenta: placenta
32764006 Portal vein: portal vein, portal vein and splenic vein
41216001 Prostate: prostate, prostate gland
81040000 Pulmonary artery: pulmonary artery
122972007 Pulmonary vein: pulmonary vein, pulmonary veins
89278009 Putamen: putamen
34402009 Rectum: rectum
73829009 Right atrium: right atrium, atrium right, heart atrium right
53085002 Right ventricle: right ventricle, ventricle right, heart ventricle right
113197003 Rib: rib, ribs
48535007 First rib: rib 1
78247007 Second rib: rib 2
25888004 Third rib: rib 3
25523003 Fourth rib: rib 4
15339008 Fifth rib: rib 5
59558009 Sixth rib: rib 6
24915002 Seventh rib: rib 7
5953002 Eighth rib: rib 8
22565002 Ninth rib: rib 9
77644006 Tenth rib: rib 10
58830002 Eleventh rib: rib 11
43993008 Twelfth rib: rib 12
54735007 Sacrum: sacrum
79601000 Scapula: scapula
64739004 Seminal Vesicle: seminal vesicle, seminal vesicles
127954009 Skeletal muscle: skeletal muscle
39937001 Skin: skin
89546000 Skull: skull
30315005 Small intestine: small intestine, small bowel
2748008 Spinal cord: spinal cord
421060004 Spine: spine, vertebral column
78961009 Spleen: spleen
35819009 Splenic vein: splenic vein
56873002 Sternum: sternum
69695003 Stomach: stomach
36765005 Subclavian artery: subclavian artery
54019009 Submandibular gland: submandibular gland
48345005 Superior vena cava: superior vena cava, svc
40689003 Testis: testis
42695009 Thalamus: thalamus
9875009 Thymus: thymus
69748006 Thyroid: thyroid gland, thyroid
12611008 Tibia: tibia
21974007 Tongue: tongue
38199008 Tooth: tooth, teeth
44567001 Trachea: trachea
399384005 Transition zone of the prostate: transition zone, prostate transition zone
45653009 Upper lobe of lung: upper lobe of lung, lung upper lobe
87953007 Ureter: ureter
13648007 Urethra: urethra
89837001 Bladder: bladder, urinary bladder
35039007 Uterus: uterus
51282000 Vertebra: vertebra, vertebrae
14806007 C1 vertebra: vertebra c1
39976000 C2 vertebra: vertebra c2
113205007 C3 vertebra: vertebra c3
5329002 C4 vertebra: vertebra c4
36978003 C5 vertebra: vertebra c5
36054005 C6 vertebra: vertebra c6
87391001 C7 vertebra: vertebra c7
64864005 T1 vertebra: vertebra t1
53733008 T2 vertebra: vertebra t2
1626008 T3 vertebra: vertebra t3
73071006 T4 vertebra: vertebra t4
56401006 T5 vertebra: vertebra t5
45296009 T6 vertebra: vertebra t6
62487009 T7 vertebra: vertebra t7
11068009 T8 vertebra: vertebra t8
82687006 T9 vertebra: vertebra t9
7610001 T10 vertebra: vertebra t10
12989004 T11 vertebra: vertebra t11
23215003 T12 vertebra: vertebra t12
66794005 L1 vertebra: vertebra l1
14293000 L2 vertebra: vertebra l2
36470004 L3 vertebra: vertebra l3
11994002 L4 vertebra: vertebra l4
49668003 L5 vertebra: vertebra l5
389080008 White Matter: white matter
"""
_ABNORMALITIES = """
367643001 Cyst: cyst, cysts, kidney cyst
79654002 Edema: edema, oedema
50960005 Hemorrhage: hemorrhage, haemorrhage
52988006 Lesion: lesion, lesions
4147007 Mass: mass
6574001 Necrosis: necrosis
108369006 Neoplasm: tumor, tumour, tumors, tumours, neoplasm
27925004 Nodule: nodule, nodules
396339007 Thrombus: thrombus
"""


def anatomy(name: str) -> Anatomy:
    """What a structure of this name is: `kidney_left`, `Left kidney` and `kidney L` are the same."""
    words = re.sub(r"[\W_]+", " ", name).casefold().split()
    known = _table()
    whole = _joined(words)
    if whole in known:
        return Anatomy(*known[whole])
    sides = {"left": LEFT, "l": LEFT, "right": RIGHT, "r": RIGHT}
    side = next((sides[word] for word in words if word in sides), None)
    bare = _joined([word for word in words if word not in sides])
    return Anatomy(*known[bare], side) if bare in known else Anatomy(TISSUE, TISSUE)


def _joined(words: list[str]) -> str:
    return re.sub(r"^vertebrae(?= [ctl]\d)", "vertebra", " ".join(words))


@cache
def _table() -> dict[str, tuple[Code, Code]]:
    """Category and code by name."""
    found = {}
    for category, lines in ((STRUCTURE, _STRUCTURES), (ABNORMAL, _ABNORMALITIES)):
        for line in lines.strip().splitlines():
            about, names = line.split(": ")
            value, meaning = about.split(" ", 1)
            for name in names.split(", "):
                found[name] = category, Code(value, meaning)
    return found
