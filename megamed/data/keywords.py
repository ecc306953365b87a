"""Medical terms that a description of a study may name: a closed list, and how they are found in free text.

Descriptions (StudyDescription, SeriesDescription, ProtocolName) are free text: they may hold a name or a date. Only
which terms of this list they have is kept, so that nothing gets out that was not in this file before. Synonyms,
abbreviations and words of other languages stand for a term.

A term is found as a whole word or run of words, whatever its case, accents and separators ("LUNG_NODULE"). Longer terms
go first: "lung nodule" is that one and not also "nodule". What is an everyday word in another language of the list
(French "main", German "ich") is not in it.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

# Each line: a term, then what else stands for it (English, German, French, Spanish; abbreviations).
_LIST = """
abdomen: abdominal, bauch, abdo
abscess: abszess, abces, absceso
adrenal: adrenals, nebenniere, surrenale, suprarrenal
alzheimer
aneurysm: aneurysma, anevrisme, aneurisma, aaa
angiography: angio, angiographie, angiografia, cta, mra, ct angiography, mr angiography
ankle: sprunggelenk, osg, cheville, tobillo
aorta: aortic, aortique, aorte
appendicitis: appendix, appendizitis, apendicitis
arthritis: arthrose, osteoarthritis, artrosis
biopsy: biopsie, biopsia
bladder: harnblase, vessie, vejiga
bone: knochen, hueso, osseous
brain: cerebral, cerebrum, hirn, gehirn, cerveau, cerebro, crane, schadel, neurocranium, ccranium
brain tumour: brain tumor, glioma, glioblastoma, gliom, meningioma, meningeom, gbm
breast: mamma, mammary, mama
bronchiectasis: bronchiektasen
cancer: carcinoma, karzinom, malignancy, neoplasm, krebs
cardiac: heart, herz, coeur, corazon, cardio, kardio
carotid: carotis, carotide
cervical spine: c spine, cspine, hws, halswirbelsaule, rachis cervical, columna cervical
chest: thorax, thoracic, torax, lunge thorax
chest x ray: cxr, rontgen thorax, radiographie thorax
cirrhosis: zirrhose, cirrhose
colon: colonic, kolon, colonography, colonoscopy
contrast: kontrast, with contrast, iv contrast, contraste, gadolinium
copd: emphysema, emphysem, emphyseme, enfisema
coronary: coronaries, koronar, koronarien, coronaire, ccta, calcium score
covid: covid 19, sars cov 2
crohn: morbus crohn, enterography
cyst: zyste, kyste, quiste
dementia: demenz, demence
diffusion: dwi, adc, dti, diffusions
dissection: dissektion
dynamic: dynamisch, dce
elbow: ellenbogen, coude, codo
embolism: embolie, embolia
epilepsy: epilepsie, seizure, seizures
eye: orbit, orbits, orbita
face: facial, gesicht, midface, mittelgesicht
fetal: fetus, foetal, obstetric, obstetrical
flair
fmri: functional mri, bold, resting state, task fmri
follow up: verlaufskontrolle, controle, suivi, seguimiento
foot: fuss, vorfuss, pied
fracture: fraktur, fractura
functional: funktionell, fonctionnel
gallbladder: gallenblase, biliary, mrcp, cholangiography
gallstone: cholelithiasis, gallensteine
gastric: stomach, magen
haematoma: hematoma, hamatom, hematome
haemorrhage: hemorrhage, bleeding, blutung, hemorragie, hemorragia
hand: mano
hernia: hernie
hip: hufte, hanche, cadera
hydrocephalus: hydrozephalus
infarct: infarction, infarkt, infarctus
infection: infekt, infection screen
interstitial lung disease: ild, pulmonary fibrosis, lung fibrosis, lungenfibrose
intestine: bowel, darm, intestin, intestino, small bowel
kidney: kidneys, renal, niere, nieren, rinon
kidney stone: urolithiasis, nephrolithiasis, ureteral stone, kub, nierensteine
knee: knie, genou, rodilla
larynx
leg: lower extremity, unterschenkel, jambe, pierna
leukaemia: leukemia
liver: hepatic, leber, foie, higado, hepar
liver lesion: hcc, hepatocellular carcinoma, liver metastasis, liver metastases, lebermetastasen
low dose: ldct, low dose ct
lumbar spine: l spine, lspine, lws, lendenwirbelsaule, rachis lombaire, columna lumbar
lung: lungs, pulmonary, lunge, lungen, poumon, poumons, pulmon, hrct
lung cancer: bronchial carcinoma, bronchialkarzinom, lung cancer screening, lung carcinoma, nsclc
lung nodule: pulmonary nodule, lung nodules, pulmonary nodules, rundherd, lungenrundherd, nodule pulmonaire
lymph node: lymph nodes, lymphadenopathy, lymphknoten
lymphoma: lymphom, lymphome, linfoma
mammography: mammo, mammogram, mammographie, mamografia, tomosynthesis
mandible: unterkiefer, jaw
mediastinum: mediastinal
meningitis
meniscus: meniskus, menisque
metastasis: metastases, metastatic, metastasen, mets
multiple sclerosis: encephalomyelitis disseminata, sclerose en plaques, esclerosis multiple
muscle: muskel, musculo
musculoskeletal: msk
myelography
neck: hals, cou, cuello
nodule: nodules, knoten, nodulo
oesophagus: esophagus, osophagus
orthopaedic: orthopedic
osteomyelitis
osteoporosis: dexa, bone density
ovary: ovarian, adnexa
paediatric: pediatric, kinder
pancreas: pancreatic, pankreas
pancreatitis: pankreatitis
parkinson
pelvis: pelvic, becken, bassin
perfusion: ctp, perfusions
pet
phantom: qa phantom
pituitary: hypophysis, hypophyse, sella
pleura: pleural effusion, pleuraerguss, effusion
pneumonia: pneumonie, neumonia, consolidation
pneumothorax
polyp: polyps
portal venous: portalvenos, portal phase
pregnancy: schwangerschaft, grossesse, embarazo
prostate: prostata, pirads, mpmri prostate
pulmonary embolism: pulmonary embolus, lungenembolie, ctpa, embolie pulmonaire
rectum: rectal, rektum
rib: ribs, rippen
sacroiliac joint: si joint, isg
sarcoidosis: sarkoidose
scoliosis: skoliose, scoliose
screening
shoulder: schulter, epaule, hombro
sinus: sinuses, nasennebenhohlen, nnh
skeleton: skelett, bone survey, skeletal survey
skull: skull base, schadelbasis
spinal cord: myelon, moelle
spine: vertebra, wirbelsaule, rachis, columna
spleen: milz, bazo
staging
sternum
stroke: schlaganfall, apoplex, avc, ictus, ischaemia, ischemia
surgery: postoperative, post op, preoperative, op planung
t1: t1w, t1 weighted, mprage
t2: t2w, t2 weighted
temporal bone: felsenbein
testis: testicular, scrotum, hoden
thoracic spine: t spine, tspine, bws, brustwirbelsaule
thrombosis: thrombus, dvt, thrombose
thyroid: schilddruse, thyroide, tiroides
tooth: dental, teeth, cbct dental
trauma: polytrauma, injury, unfall
tuberculosis: tuberkulose
tumour: tumor, tumeur, mass, raumforderung
ultrasound: sonography, sonographie, ultraschall, echographie
urography: ctu, ct urography
uterus: endometrium, gebarmutter
vascular: vessels, gefasse, vasculaire
vasculitis
venography: mrv, ctv
whole body: ganzkorper, wbct
wrist: handgelenk, poignet, muneca
"""


@cache
def terms() -> dict[str, str]:
    """The term that each spelling stands for, normalised as `_words` does; terms stand for themselves."""
    found: dict[str, str] = {}
    for line in _LIST.strip().splitlines():
        term, _, others = line.partition(":")
        for spelling in (term, *filter(None, others.split(","))):
            normal = " ".join(_words(spelling))
            if found.setdefault(normal, term) != term:
                raise ValueError(f"{normal!r} stands for {found[normal]!r} and {term!r}")
    return found


def find_keywords(texts: Iterable[str]) -> tuple[str, ...]:
    """Terms that texts name, by the alphabet.

    Args:
        texts: free text, which is not kept.
    """
    known = terms()
    longest = max(spelling.count(" ") for spelling in known) + 1
    found: set[str] = set()
    for text in texts:
        words, place = _words(text), 0
        while place < len(words):
            for length in range(min(longest, len(words) - place), 0, -1):
                if term := known.get(" ".join(words[place : place + length])):
                    found.add(term)
                    place += length
                    break
            else:
                place += 1
    return tuple(sorted(found))


def term_of(word: str) -> str | None:
    """The term that a spelling stands for, None if the list does not have it."""
    return terms().get(" ".join(_words(word)))


def listing() -> str:
    """The list as text: a line a term, with what else stands for it."""
    return _LIST.strip()


def _words(text: str) -> list[str]:
    """Words in small letters without accents; runs of letters and of digits belong together (T2W, COVID19)."""
    plain = unicodedata.normalize("NFKD", text.replace("ß", "ss")).encode("ascii", "ignore").decode().lower()
    return re.findall(r"[a-z0-9]+", plain)
