"""Medical terms that a description of a study may name: a closed list, and how they are found in free text.

Descriptions (StudyDescription, SeriesDescription, ProtocolName, ...) are free text: they may hold a name or a date.
Only which terms of this list they have is kept, so that nothing gets out that was not in this file before. Synonyms,
abbreviations and words of other languages stand for a term.

A term is found as a whole word or run of words, whatever its case, accents and separators ("LUNG_NODULE",
"ThoraxRoutine", "SCHAEDEL"), and with a plural's s. Longer terms go first: "lung nodule" is that one and not also
"nodule", "without contrast" is not "contrast". What a term is there for is not understood: "no fracture" names one.
What is an everyday word in another language of the list (French "main", German "ich") is not in it.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

# Each line: a term, then what else stands for it (English, German, French, Spanish; abbreviations).
_LIST = """
abdomen: abdominal, bauch, abdo, abd, oberbauch
abscess: abszess, abcès, absceso
achilles tendon: achillessehne
adenoma: adenom, adénome
adrenal: nebenniere, surrénale, suprarrenal
alzheimer
aneurysm: aneurysma, anévrisme, aneurisma, aaa
angiography: angio, angiographie, angiografía, cta, mra, ct angiography, mr angiography
ankle: sprunggelenk, osg, cheville, tobillo
aorta: aortic, aortique, aorte, aortenklappe, tavi, tavr
appendicitis: appendix, appendizitis, appendicite, apendicitis
arm: upper extremity, oberarm, humerus, bras, brazo
arterial phase: arteriell, artérielle
arteriovenous malformation: avm
arthritis: arthrose, osteoarthritis, artrosis, artritis
arthrography: arthrographie, arthrogram, arthro
arthroplasty: prosthesis, prothese, prothèse, prótesis, endoprothese, hip replacement, knee replacement
ascites: aszites, ascite
atelectasis: atelektase
axilla: axillary, achsel, aisselle
bile duct: biliary, mrcp, ercp, cholangiography, cholangiopancreatography, gallengang, voies biliaires
biopsy: biopsie, biopsia, bx
bladder: harnblase, vessie, vejiga
bone: knochen, hueso, osseous
bone marrow: knochenmark, moelle osseuse
brain: cerebral, cerebrum, hirn, gehirn, cerveau, cerebro, crâne, schädel, neurocranium, ccranium, neuro
brain tumour: brain tumor, glioma, glioblastoma, gliom, glioblastom, meningioma, meningeom, gbm, hirntumor, méningiome
breast: mamma, mammary, mama
bronchiectasis: bronchiektasen
bronchus: bronchial, bronchien, bronches
cancer: carcinoma, karzinom, malignancy, neoplasm, krebs
cardiac: heart, herz, coeur, corazón, cardio, kardio, cardiac mr, cmr
cardiomyopathy: kardiomyopathie, cardiomyopathie, hcm
carotid: carotis, carotide
cartilage: knorpel
cerebellopontine angle: kleinhirnbrückenwinkel, acoustic neuroma, vestibular schwannoma, akustikusneurinom
cerebellum: cerebellar, kleinhirn, posterior fossa
cervical spine: c spine, cspine, hws, halswirbelsäule, rachis cervical, columna cervical
cervix: uterine cervix, zervix
chest: thorax, thoracic, tórax, lunge thorax, thoracique
chest x ray: cxr, röntgen thorax, thorax röntgen, radiographie thorax, radiographie pulmonaire, chest xray
cholecystitis: cholezystitis
cirrhosis: zirrhose, cirrhose, cirrosis
clavicle: klavikula, schlüsselbein
colon: colonic, kolon, colonography, colonoscopy
concussion: traumatic brain injury, tbi, schädelhirntrauma, schädel hirn trauma
contrast: kontrast, kontrastmittel, with contrast, iv contrast, mit km, nach km, contraste, gadolinium,
    with and without contrast, with and without iv contrast, with without contrast, w and wo contrast, w wo contrast,
    w and w o contrast, w w o contrast, w wo iv contrast, w w o iv contrast, mit und ohne kontrastmittel,
    mit und ohne km, avec et sans contraste, con y sin contraste
copd
coronary: coronaries, koronar, koronarien, coronaire, ccta, calcium score
covid: covid 19, covid19, sars cov 2
crohn: morbus crohn, enterography
cyst: zyste, kyste, quiste
cystic fibrosis: mukoviszidose, mucoviscidose
dementia: demenz, démence
diffusion: dwi, adc, dti, diffusions
disc herniation: herniated disc, bandscheibenvorfall, bandscheibe, hernie discale, intervertebral disc
dissection: dissektion
diverticulitis: divertikulitis
drainage
dynamic: dynamisch, dce
ear: inner ear, internal auditory canal, iac, cholesteatoma, innenohr
effusion: erguss
elbow: ellenbogen, coude, codo
embolism: embolie, embolia
emphysema: emphysem, emphysème, enfisema
endometriosis: endometriose
epilepsy: epilepsie, epilepsia, seizure
eye: orbit, orbita
face: facial, gesicht, midface, mittelgesicht
fat suppression: fat saturated, fat sat, fatsat, fs stir, stir
femur: thigh, oberschenkel, cuisse
fetal: fetus, foetal, obstetric, obstetrical
fever: fieber
finger: doigt
fistula: fistel, fistule
flair
fluoroscopy: durchleuchtung
fmri: functional mri, bold, resting state, task fmri
follow up: followup, verlaufskontrolle, verlauf, contrôle, suivi, seguimiento
foot: fuß, vorfuß, pied
forearm: unterarm, radius, ulna
fracture: fraktur, fractura, fx
functional: funktionell, fonctionnel
gallbladder: gallenblase, vésicule biliaire
gallstone: cholelithiasis, gallensteine
gastric: stomach, magen, estomac
goitre: goiter, struma
haemangioma: hemangioma, hämangiom
haematoma: hematoma, hämatom, hématome
haemorrhage: hemorrhage, bleeding, blutung, hémorragie, hemorragia
hand: mano
head: kopf, tête, cabeza, cranial, cranium, cct, kraniell
hepatitis
hernia: hernie
hip: hüfte, hüftgelenk, hanche, cadera
hippocampus: hippokampus
hydrocephalus: hydrozephalus
hydronephrosis: harnstau
ileus: bowel obstruction, small bowel obstruction, sbo
infarct: infarction, infarkt, infarctus
infection: infekt, infektion, infection screen
interstitial lung disease: ild, pulmonary fibrosis, lung fibrosis, lungenfibrose, ipf, asbestosis
intestine: bowel, darm, intestin, intestino, small bowel, dünndarm
ischaemia: ischemia, ischämie, ischémie, isquemia
kidney: renal, niere, nieren, riñón, kidneys
kidney stone: urolithiasis, nephrolithiasis, ureteral stone, renal colic, nierensteine
knee: knie, kniegelenk, genou, rodilla
larynx: kehlkopf
leg: lower extremity, unterschenkel, jambe, pierna
leukaemia: leukemia, leukämie
ligament: acl, kreuzband, cruciate ligament
liver: hepatic, leber, foie, hígado, hepar
liver lesion: hcc, hepatocellular carcinoma, liver metastasis, liver metastases, lebermetastasen
localiser: localizer, scout, topogram, surview
low dose: ldct, low dose ct, lowdose
lumbar spine: l spine, lspine, lws, lendenwirbelsäule, rachis lombaire, columna lumbar
lung: pulmonary, lunge, lungen, poumon, pulmon, hrct, high resolution ct
lung cancer: bronchial carcinoma, bronchialkarzinom, lung cancer screening, lung carcinoma, nsclc
lung nodule: pulmonary nodule, rundherd, lungenrundherd, nodule pulmonaire, nódulo pulmonar
lymph node: lymphadenopathy, lymphknoten, ganglion lymphatique
lymphoma: lymphom, lymphome, linfoma
mammography: mammo, mammogram, mammographie, mamografía, tomosynthesis
mandible: unterkiefer, jaw
maxilla: oberkiefer
mediastinum: mediastinal
melanoma: melanom
meningitis
meniscus: meniskus, ménisque, menisco
mesothelioma: mesotheliom
metastasis: metastases, metastatic, metastasen, mets, métastase
multiple sclerosis: encephalomyelitis disseminata, multiple sklerose, sclérose en plaques, esclerosis múltiple
muscle: muskel, musculo
musculoskeletal: msk
myelography: myelographie
myeloma: multiple myeloma, plasmozytom
myocardial infarction: herzinfarkt, infarctus du myocarde
myocarditis: myokarditis
myocardium: myocardial, myokard
myoma: fibroid, myom
nasopharynx: pharynx, rachen
neck: hals, cou, cuello
nerve: brachial plexus
neuroendocrine tumour: neuroendocrine tumor, dotatate, dotatoc
nodule: knoten, nódulo
nose: nasal, nase
oedema: edema, ödem, oedème
oesophagus: esophagus, ösophagus, speiseröhre, oesophage, esófago
orthopaedic: orthopedic
osteomyelitis
osteonecrosis: avascular necrosis, avn
osteoporosis: dexa, dxa, bone density, osteoporose
ovary: ovarian, adnexa
paediatric: pediatric, kinder
pancreas: pancreatic, pankreas, páncreas
pancreatitis: pankreatitis, pancréatite
parkinson
parotid: parotis, salivary gland, speicheldrüse
patella: kniescheibe
pelvis: pelvic, becken, bassin
perfusion: ctp, perfusions
pericardium: pericardial, perikard
peritoneum: peritoneal
pet: pet ct, petct, fdg, pet scan, tep scan, tep tdm
phantom: qa phantom
pituitary: hypophysis, hypophyse, hipófisis, sella
placenta: plazenta
pleura: pleural
pleural effusion: pleuraerguss, épanchement pleural, derrame pleural
pneumonia: pneumonie, neumonía, consolidation, lungenentzündung
pneumothorax: neumotórax
polyp
portal venous: portalvenös, portal phase, portal vein, pfortader
pregnancy: schwangerschaft, grossesse, embarazo
prostate: prostata, próstata, pirads, pi rads, mpmri prostate, psma
proton density: pdw, pd weighted
pulmonary embolism: pulmonary embolus, lungenembolie, ctpa, embolie pulmonaire, embolia pulmonar,
    tromboembolismo pulmonar, pe protocol, pe study, ct pe
radiotherapy: radiation therapy, rt planning, bestrahlung, bestrahlungsplanung
rectum: rectal, rektum
retroperitoneum: retroperitoneal
rib: rippen, costilla
rotator cuff: rotatorenmanschette, supraspinatus
sacroiliac joint: si joint, isg, sijoint
sacrum: coccyx, steißbein
sarcoidosis: sarkoidose
sarcoma: sarkom, sarcome
scapula: schulterblatt
scoliosis: skoliose, scoliose
screening
shoulder: schulter, schultergelenk, épaule, hombro
sinus: nasennebenhöhlen, nnh, sinusitis
skeleton: skelett, bone survey, skeletal survey
skull: skull base, schädelbasis
spectroscopy: mr spectroscopy, spektroskopie
spinal canal: spinal stenosis, spinalkanal, spinalkanalstenose
spinal cord: myelon, moelle
spine: vertebra, wirbelsäule, rachis, columna, vertebrae
spleen: milz, bazo
staging
steatosis: fatty liver, fettleber
stenosis: stenose, sténose
sternum
stroke: schlaganfall, apoplex, avc, ictus, hirninfarkt, ischämischer insult, hirninsult, cerebral infarction, cva, tia,
    cerebral ischaemia, cerebral ischemia, accident vasculaire cérébral
subarachnoid haemorrhage: subarachnoid hemorrhage, subarachnoidalblutung, sah
subdural haematoma: subdural hematoma, subduralhämatom, sdh
surgery: postoperative, post op, preoperative, op planung, postoperativ, präoperativ
susceptibility: swi, susceptibility weighted
t1: t1w, t1 weighted, mprage
t2: t2w, t2 weighted
temporal bone: felsenbein
temporomandibular joint: tmj, kiefergelenk
tendon: sehne
testis: testicular, scrotum, hoden
thoracic spine: t spine, tspine, bws, brustwirbelsäule
thrombosis: thrombus, dvt, thrombose, trombosis
thymus: thymoma
thyroid: schilddrüse, thyroïde, tiroides
time of flight: tof
toe: zehe, orteil
tongue: zunge
tooth: dental, teeth, cbct dental
trachea: tracheal, luftröhre
transplant: transplantation, trasplante
trauma: polytrauma, injury, unfall, traumatisme
tuberculosis: tuberkulose, tuberculose
tumour: tumor, tumeur, mass, raumforderung
ultrasound: sonography, sonographie, ultraschall, échographie, ecografía
ureter: ureteral, harnleiter
urinary tract: kub, harnwege, voies urinaires
urography: ctu, ct urography, urographie
uterus: endometrium, gebärmutter, utérus, útero
vascular: vessel, gefäß, gefäße, vasculaire
vasculitis: vaskulitis
venography: mrv, ctv
whole body: ganzkörper, wbct, corps entier, cuerpo entero
without contrast: non contrast, noncontrast, no contrast, wo contrast, w o contrast, without iv contrast,
    wo iv contrast, w o iv contrast, non enhanced, unenhanced, ncct, nativ, ohne kontrast, ohne kontrastmittel, ohne km,
    sans contraste, sans injection, sin contraste
wrist: handgelenk, poignet, muñeca
"""


@cache
def terms() -> dict[str, str]:
    """The term that each spelling stands for, normalised as `_words` does; terms stand for themselves."""
    found: dict[str, str] = {}
    for line in listing().splitlines():
        term, _, others = line.partition(":")
        for spelling in (term, *filter(None, others.split(","))):
            for written in (spelling, _without_umlauts(spelling)):
                normal = " ".join(_words(written))
                if found.setdefault(normal, term) != term:
                    raise ValueError(f"{normal!r} stands for {found[normal]!r} and {term!r}")
    return found


def find_keywords(texts: Iterable[str]) -> tuple[str, ...]:
    """Terms that texts name, by the alphabet.

    Args:
        texts: free text, which is not kept.
    """
    found: set[str] = set()
    for text in texts:
        # "ThoraxRoutine" is two words, and "fMRI" is one.
        for written in {text, _CAMEL.sub(" ", text)}:
            found.update(_terms_of(_words(written)))
    return tuple(sorted(found))


def term_of(word: str) -> str | None:
    """The term that a spelling stands for, None if the list does not have it."""
    return _look_up(_words(word))


def listing() -> str:
    """The list as text: a line a term, with what else stands for it."""
    return _LIST.strip().replace(",\n    ", ", ")


def _terms_of(words: Sequence[str]) -> Iterable[str]:
    place, longest = 0, _most_words()
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            if term := _look_up(words[place : place + length]):
                yield term
                place += length
                break
        else:
            place += 1


@cache
def _most_words() -> int:
    return max(spelling.count(" ") for spelling in terms()) + 1


def _look_up(words: Sequence[str]) -> str | None:
    spelling, known = " ".join(words), terms()
    singular = spelling[:-1] if spelling.endswith("s") and len(spelling) > 3 else spelling
    return known.get(spelling) or known.get(singular)


_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
# Letters that are not a letter and a mark to Unicode.
_LIGATURES = str.maketrans({"œ": "oe", "æ": "ae"})
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue"})


def _words(text: str) -> list[str]:
    """Words in small letters without accents; runs of letters and of digits belong together (T2W, COVID19)."""
    apart = unicodedata.normalize("NFKD", text.casefold().translate(_LIGATURES))
    plain = "".join(character for character in apart if not unicodedata.combining(character))
    return re.findall(r"[^\W_]+", plain)


def _without_umlauts(text: str) -> str:
    """As German is written where there are no umlauts."""
    return unicodedata.normalize("NFC", text).translate(_UMLAUTS)
