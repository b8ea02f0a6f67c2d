"""A labelled set of Korean documents, good and bad of every kind, made from templates written for these tests.

Every document is drawn with a seed, so that a set is the same everywhere. Good documents are of many genres, among them
such as rules easily take for bad: news about gambling, health advice, chat, recipes with lists, text with English.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Labelled:
    """A document, its kind, whether a corpus should keep it, and which rules should drop it (any one is enough)."""

    text: str
    kind: str
    good: bool
    rules: tuple[str, ...] = ()


SURNAMES = "김이박최정강조윤장임한오서신권황안송류홍"
GIVEN = [
    "민준",
    "서연",
    "지훈",
    "하은",
    "도윤",
    "수빈",
    "예준",
    "지우",
    "현우",
    "유진",
    "은주",
    "영호",
    "미경",
    "상철",
    "정숙",
]
CITIES = [
    "서울",
    "부산",
    "대구",
    "광주",
    "대전",
    "울산",
    "전주",
    "청주",
    "춘천",
    "목포",
    "강릉",
    "제주",
    "안동",
    "통영",
    "여수",
]
MONTHS = ["1월", "2월", "3월", "4월", "5월", "6월", "7월", "8월", "9월", "10월", "11월", "12월"]
THINGS = ["도서관", "시장", "박물관", "항구", "학교", "공원", "극장", "병원", "정류장", "양조장", "과수원", "등대"]
FOODS = ["된장찌개", "김치전", "미역국", "잡채", "떡볶이", "비빔국수", "갈비탕", "호박죽", "오징어볶음", "감자조림"]

NEWS = [
    "{city}시는 {month} {n}일 낡은 {thing} 건물을 고쳐 주민들이 함께 쓰는 공간으로 바꾸겠다고 밝혔다.",
    "이번 사업에는 모두 {n}억 원이 들어가며 공사는 내년 봄에 마무리될 예정이다.",
    '{name} 시장은 기자 간담회에서 "주민의 의견을 끝까지 듣고 설계에 반영하겠다"고 말했다.',
    "근처에서 가게를 하는 {name}({n}) 씨는 손님이 늘어날 것 같아 기대가 크다며 웃었다.",
    "반면 일부 주민은 공사 기간의 소음과 교통 혼잡을 걱정하며 대책을 요구하고 있다.",
    "시의회는 다음 주에 예산안을 심사하고, 결과에 따라 사업의 범위를 조정하기로 했다.",
    "지난해 비슷한 사업을 마친 이웃 도시에서는 방문객이 {n}퍼센트 늘었다는 조사 결과가 나왔다.",
    "전문가들은 건물을 새로 짓는 것보다 고쳐 쓰는 편이 탄소 배출을 줄이는 데에도 도움이 된다고 설명한다.",
    "한편 경찰은 공사 구간의 안전을 위해 임시 신호등을 설치하고 우회 도로를 안내할 계획이다.",
    "현장을 찾은 취재진에게 담당 공무원은 늦어도 {month}까지는 윤곽이 드러날 것이라고 답했다.",
    "{name} 교수는 이 같은 변화가 지역 경제에 미치는 효과를 조금 더 지켜보아야 한다고 조언했다.",
    "시는 누리집과 주민센터를 통해 사업 내용을 자세히 알리고 설문 조사도 진행하고 있다.",
]
ENCYCLOPEDIA = [
    "{thing}은 사람들이 모여 물건이나 지식을 나누기 위하여 만든 공간으로, 기원은 고대까지 거슬러 올라간다.",
    "우리나라에서는 조선 시대 후기에 이르러 오늘날과 비슷한 형태가 나타나기 시작하였다.",
    "{city}에 남아 있는 건물은 19{n}년에 세워졌으며, 벽돌과 나무를 함께 써서 지은 점이 특징이다.",
    "지붕의 형태는 지역의 기후와 관계가 깊은데, 눈이 많이 오는 곳일수록 경사가 가파르다.",
    "문헌에 따르면 당시 이곳을 찾은 사람은 하루에 {n}명이 넘었다고 한다.",
    "일제 강점기에는 이름이 바뀌었으나 광복 이후 본래의 이름을 되찾았다.",
    "학자들은 이러한 변화가 도시의 성장과 밀접하게 연결되어 있다고 본다.",
    "현재는 국가 등록 문화재로 지정되어 있으며, 내부는 전시실로 사용되고 있다.",
    "비슷한 예로는 {city}의 옛 {thing}을 들 수 있는데, 규모는 더 작지만 구조가 거의 같다.",
    "이 건물을 설계한 사람에 대해서는 여러 가지 주장이 있으나 아직 확인된 것은 없다.",
    "20세기 후반에는 관광객이 늘어나면서 주변에 숙박 시설과 음식점이 들어섰다.",
    "명칭은 한자어 會合(회합)에서 나온 것으로 추정되지만 순우리말에서 왔다는 견해도 있다.",
]
DIARY = [
    "오늘은 아침부터 비가 내려서 우산을 쓰고 {thing}까지 천천히 걸어갔다.",
    "버스를 기다리는 동안 옆에 서 있던 할머니가 사탕을 하나 주셨는데 왠지 마음이 따뜻해졌다.",
    "점심에는 {name}와 {food}를 먹었는데 생각보다 매워서 물을 세 잔이나 마셨다.",
    "요즘은 잠들기 전에 책을 조금씩 읽는데, 어느새 두꺼운 소설을 반이나 읽었다.",
    "어릴 때 살던 골목을 지나갔더니 그 많던 가게가 다 사라지고 없었다.",
    "엄마에게 전화를 걸었더니 김장을 언제 할지 벌써부터 걱정하고 계셨다.",
    "저녁에는 {city}에서 온 친구를 만나 밤늦게까지 이런저런 이야기를 나누었다.",
    "집에 돌아오는 길에 올려다본 하늘에는 별이 유난히 많이 떠 있었다.",
    "내일은 미뤄 두었던 청소를 하고 화분에 물도 주어야겠다고 다짐했다.",
    "별것 아닌 하루였지만 이렇게 적어 두면 나중에 다시 읽을 때 반가울 것 같다.",
    "회사에서는 하루 종일 회의만 하느라 정작 해야 할 일은 하나도 못 했다.",
    "그래도 퇴근길에 좋아하는 노래가 나와서 기분이 조금 나아졌다.",
]
RECIPE = [
    "먼저 {food}에 들어갈 채소를 깨끗이 씻어서 먹기 좋은 크기로 썰어 주세요.",
    "냄비에 물을 {n}컵 붓고 다시마와 멸치를 넣어 십 분 정도 끓이면 국물이 완성됩니다.",
    "양념장은 간장 두 숟가락에 다진 마늘과 참기름을 조금 넣고 잘 섞어 두면 됩니다.",
    "불은 처음에는 세게 하다가 끓기 시작하면 약하게 줄이는 것이 중요해요.",
    "간을 보고 싱거우면 소금을 조금 더 넣고, 짜면 물을 약간 부어 주세요.",
    "고기는 미리 핏물을 빼 두어야 잡내가 나지 않고 국물도 맑아집니다.",
    "마지막에 파와 고추를 올리면 보기에도 좋고 맛도 한결 깔끔해져요.",
    "남은 재료는 밀폐 용기에 담아 냉장고에 두면 사흘 정도는 괜찮습니다.",
    "아이들이 먹을 때에는 고춧가루를 빼고 대신 꿀을 조금 넣어 보세요.",
    "따뜻한 밥과 함께 내면 다른 반찬이 없어도 한 끼로 충분하답니다.",
]
REVIEW = [
    "어제 친구랑 보고 왔는데 진짜 좋아ㅋㅋㅋㅋ 생각보다 훨씬 재미있었어요.",
    "배우들 연기도 좋고 음악이 너무 예뻐서 집에 오는 길에 계속 흥얼거렸네요.",
    "중간에 살짝 지루하긴 한데... 마지막 십 분은 눈물이 났다ㅠㅠ",
    "부모님이랑 같이 봐도 괜찮을 것 같아요 강추합니다~",
    "솔직히 기대 안 하고 갔는데 의외로 괜찮아서 놀랐어요!!",
    "전작보다는 좀 아쉽지만 그래도 돈이 아깝지는 않았음.",
    "{name} 배우는 이런 역할이 정말 잘 어울리는 듯해요ㅎㅎ",
    "결말이 조금 허무하다는 사람도 있던데 저는 오히려 여운이 남아서 좋았습니다.",
    "평일 낮에 갔더니 사람이 없어서 편하게 봤어요, 팝콘도 맛있었고요.",
    "별 다섯 개 중에 네 개 드립니다. 한 번 더 볼 생각도 있어요!",
    "다만 자막이 너무 빨리 지나가서 놓친 대사가 몇 개 있었네요.",
]
TECHNICAL = [
    "Git에서 커밋을 되돌리려면 revert 명령을 쓰는 것이 안전한데, 기록을 지우지 않고 반대되는 커밋을 만들기 때문이다.",
    "Python의 리스트는 크기가 변하는 배열이므로 끝에 값을 더하는 일은 빠르지만 앞에 넣는 일은 느리다.",
    "서버의 응답 시간이 {n}ms를 넘으면 먼저 데이터베이스 질의를 확인하고 필요한 인덱스를 추가해야 한다.",
    "Docker 이미지를 작게 만들고 싶다면 빌드 단계와 실행 단계를 나누어 필요한 파일만 복사하면 된다.",
    "캐시를 쓰면 빨라지지만 언제 값을 버릴지 정하지 않으면 오래된 결과가 사용자에게 보일 수 있다.",
    "테스트는 한 번에 한 가지만 확인하도록 짧게 쓰고, 이름만 보아도 무엇을 검사하는지 알 수 있어야 한다.",
    "메모리가 부족하다는 오류가 나면 배치 크기를 줄이거나 gradient checkpointing을 켜 보는 것이 좋다.",
    "함수의 인자가 많아지면 호출하는 쪽에서 실수하기 쉬우므로 하나의 구조체로 묶는 방법을 생각해 보자.",
    "로그에는 시각과 요청 번호를 함께 남겨야 나중에 여러 서버의 기록을 이어서 읽을 수 있다.",
    "비밀번호는 그대로 저장하지 않고 salt를 더해 해시한 값만 저장해야 유출되었을 때 피해를 줄일 수 있다.",
]
LAW = [
    "현행법은 {thing}의 설치와 운영에 관하여 필요한 사항을 규정하고 있음.",
    "그러나 신고 절차가 복잡하고 처리 기간이 명확하지 않아 국민의 불편이 크다는 지적이 있음.",
    "이에 신고일부터 {n}일 이내에 수리 여부를 통지하도록 하려는 것임(안 제{n}조제2항).",
    "피고는 원고에게 계약에 따른 대금을 지급할 의무가 있다고 봄이 타당하다.",
    "원심은 이러한 사정을 살피지 아니한 채 청구를 기각하였으므로 판결에 영향을 미친 잘못이 있다.",
    "따라서 상고를 받아들여 원심 판결을 파기하고 사건을 다시 심리하게 하기 위하여 환송한다.",
    "또한 과태료의 상한을 현실에 맞게 조정하여 제도의 실효성을 높이고자 함.",
    "공공기관의 장은 매년 {month} 말일까지 전년도의 실적을 국회에 보고하여야 한다.",
    "이 법은 공포 후 6개월이 경과한 날부터 시행하되, 종전의 처분에는 종전의 규정을 적용한다.",
    "국가와 지방자치단체는 예산의 범위에서 필요한 비용의 전부 또는 일부를 지원할 수 있다.",
]
NOVEL = [
    "{name}는 창가에 앉아 항구로 들어오는 배를 오래도록 바라보고 있었다.",
    '"정말 떠날 생각이야?" 하고 묻는 목소리가 조금 떨렸다.',
    "대답 대신 그는 주머니에서 낡은 편지 한 장을 꺼내 탁자 위에 올려놓았다.",
    "바람이 불 때마다 덧문이 삐걱거리며 어둠 속에서 누군가 걸어오는 듯한 소리를 냈다.",
    "그해 겨울은 유난히 길어서 {month}이 되어도 강의 얼음이 풀리지 않았다.",
    "노인은 아무 말 없이 장작을 하나 더 집어 난로 속에 밀어 넣었다.",
    '"기다리는 사람이 있으면 길은 언제나 짧은 법이지." 그녀가 웃으며 말했다.',
    "골목 끝의 {thing}에서는 밤마다 희미한 불빛이 새어 나오곤 했다.",
    "어머니가 돌아가신 뒤로 집 안의 시계는 모두 같은 시각에 멈추어 있었다.",
    "그는 그날의 약속을 잊지 않았지만, 돌아갈 용기가 나지 않아 역 앞을 서성거렸다.",
    "멀리서 기적이 울리자 개들이 한꺼번에 짖기 시작했다.",
]
GAMBLING_NEWS = [
    "경찰은 해외에 서버를 두고 불법 도박 사이트를 운영한 혐의로 {name}({n}) 씨 등 {n}명을 붙잡았다.",
    "이들은 스포츠 경기의 결과를 맞히면 배당금을 주는 방식으로 회원을 모은 것으로 조사됐다.",
    "청소년이 바카라나 슬롯 같은 온라인 카지노 게임에 빠지는 사례도 해마다 늘고 있다.",
    "상담 센터에 따르면 도박 문제로 도움을 청한 십 대는 지난해보다 {n}퍼센트 많아졌다.",
    "전문가는 처음에는 소액으로 시작하지만 잃은 돈을 되찾으려다 빚이 커진다고 설명했다.",
    "정부는 불법 사이트를 신속하게 차단하고 예방 교육을 강화하기로 했다.",
    "한 피해자는 돈을 환전해 주지 않고 사라지는 이른바 먹튀를 당했다고 털어놓았다.",
    "법원은 죄질이 나쁘다며 주범에게 징역 {n}개월을 선고하고 범죄 수익을 모두 추징했다.",
    "은행들도 수상한 거래를 찾아내기 위해 감시 체계를 손보고 있다.",
    "가족의 관심과 빠른 상담이 무엇보다 중요하다는 것이 현장의 목소리다.",
]
HEALTH = [
    "성교육 시간에는 몸의 변화뿐 아니라 서로의 동의를 존중하는 태도도 함께 가르쳐야 한다.",
    "피임 방법마다 효과와 부작용이 다르므로 의사와 상담한 뒤에 고르는 것이 좋다.",
    "콘돔은 임신을 막을 뿐 아니라 성병을 예방하는 데에도 도움이 된다.",
    "청소년기의 자위는 자연스러운 행동이지만 지나치게 죄책감을 느끼는 학생도 많다.",
    "유방암은 일찍 발견할수록 치료 결과가 좋으므로 한 달에 한 번 스스로 검사해 보기를 권한다.",
    "혈압이 높은 사람은 짠 음식을 줄이고 하루에 삼십 분 이상 걷는 것이 바람직하다.",
    "약을 먹는 동안 어지럽거나 가슴이 답답하면 바로 복용을 멈추고 병원에 가야 한다.",
    "질문을 부끄러워하지 않도록 교사가 먼저 편안한 분위기를 만들어 주는 것이 중요하다.",
    "감기에 걸렸을 때에는 물을 자주 마시고 충분히 쉬는 것이 가장 좋은 치료다.",
    "당뇨병이 있는 사람은 발에 작은 상처가 나도 가볍게 여기지 말아야 한다.",
]
QUESTION = [
    "안녕하세요, 이번에 {city}로 이사하게 되었는데 아이를 보낼 만한 {thing}이 가까이에 있을까요?",
    "저도 작년에 같은 고민을 했는데 결국 직접 가서 보는 것이 제일 확실하더라고요.",
    "전세 계약을 할 때에는 등기부 등본을 꼭 확인하고 확정일자를 받아 두세요.",
    "보증금이 {n}00만 원 정도라면 보험에 드는 비용도 생각보다 크지 않습니다.",
    "주말에는 사람이 많으니까 되도록 평일 오전에 가 보시는 것을 추천드려요.",
    "혹시 주차가 가능한지 미리 전화해서 물어보면 헛걸음을 하지 않을 거예요.",
    "답변 감사합니다. 말씀해 주신 대로 해 보고 결과를 다시 올릴게요.",
    "저는 반대로 생각하는데, 조금 멀더라도 조용한 동네가 아이에게는 더 낫지 않을까요?",
    "관리비에 난방비가 들어 있는지에 따라서 한 달 생활비가 많이 달라집니다.",
    "참고로 그 동네는 겨울에 길이 자주 얼어서 차보다 지하철이 편해요.",
]
GENRES = {
    "news": NEWS,
    "encyclopedia": ENCYCLOPEDIA,
    "diary": DIARY,
    "recipe": RECIPE,
    "review": REVIEW,
    "technical": TECHNICAL,
    "law": LAW,
    "novel": NOVEL,
    "gambling news": GAMBLING_NEWS,
    "health": HEALTH,
    "question": QUESTION,
}


def fill(rng: random.Random, template: str) -> str:
    """Puts names, places and numbers into a template."""
    return template.format(
        city=rng.choice(CITIES),
        month=rng.choice(MONTHS),
        thing=rng.choice(THINGS),
        food=rng.choice(FOODS),
        name=rng.choice(SURNAMES) + rng.choice(GIVEN),
        n=rng.randint(11, 98),
    )


def prose(rng: random.Random, genre: str | None = None, sentences: int = 0) -> str:
    """A good document: sentences of one genre in paragraphs, on lines of their own, or hard-wrapped."""
    pool = GENRES[genre or rng.choice(list(GENRES))]
    chosen = [fill(rng, sentence) for sentence in rng.sample(pool, sentences or rng.randint(4, len(pool)))]
    layout = rng.random()
    if genre == "recipe" and layout < 0.4:
        return "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(chosen, start=1))
    if layout < 0.6:
        return " ".join(chosen)
    if layout < 0.85:
        return "\n".join(chosen)
    lines, line = [], ""
    for word in " ".join(chosen).split():
        if len(line) + len(word) > 38:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def good_documents(count: int, seed: int) -> list[Labelled]:
    """Good documents of all genres in turn."""
    rng = random.Random(seed)
    genres = list(GENRES)
    return [Labelled(prose(rng, genres[n % len(genres)]), genres[n % len(genres)], True) for n in range(count)]


MENU_WORDS = [
    *(
        "로그인",
        "회원가입",
        "장바구니",
        "마이페이지",
        "고객센터",
        "공지사항",
        "이벤트",
        "자주묻는질문",
        "회사소개",
        "이용약관",
    ),
    *(
        "개인정보처리방침",
        "사이트맵",
        "배송조회",
        "상품문의",
        "베스트",
        "신상품",
        "여성의류",
        "남성의류",
        "가전",
        "식품",
        "도서",
    ),
    *("화장품", "스포츠", "유아동", "반려동물", "여행", "쿠폰", "랭킹", "브랜드관", "매장안내", "채용정보"),
]
GOODS = [
    *(
        "운동화",
        "청바지",
        "원피스",
        "머그컵",
        "텀블러",
        "이어폰",
        "가습기",
        "쿠션",
        "담요",
        "수납장",
        "책상",
        "의자",
        "조명",
    ),
    *("커튼", "러그", "접시", "냄비", "우산", "배낭", "모자"),
]
COLOURS = ["블랙", "화이트", "네이비", "베이지", "그레이", "카키", "와인", "민트", "옐로우", "핑크"]
ENGLISH = [
    "The old harbour was quiet that evening and only a few boats returned before the storm arrived.",
    "She opened the letter slowly because she already knew what her brother would have written.",
    "Nobody in the village remembered who had built the lighthouse or why it stood so far inland.",
    "A good recipe needs patience more than skill, and fresh herbs more than expensive meat.",
    "The committee will publish its report next month after all members have read the final draft.",
]
JAPANESE = [
    "この店のラーメンはスープがとても濃くて、何度も食べに行きたくなります。",
    "ご注文の商品は三日以内にお届けいたしますので、しばらくお待ちください。",
    "新しい図書館は駅から歩いて五分のところにあり、夜遅くまで開いています。",
    "お支払いはクレジットカードまたは銀行振込をご利用いただけます。",
    "彼女は窓の外を見ながら、故郷の海のことを思い出していた。",
]


def menu(rng: random.Random) -> str:
    """Navigation of a shop or board."""
    words = rng.sample(MENU_WORDS, rng.randint(16, 28))
    return rng.choice([" ", "\n", " | ", " > "]).join(words)


def gambling(rng: random.Random) -> str:
    """An advertisement of gambling sites, sometimes with a sentence of prose around it."""
    parts = [
        f"{rng.choice(CITIES)} 카지노사이트 추천 가입코드 {rng.randint(1000, 9999)} 꽁머니 {rng.randint(1, 9)}만 지급",
        "먹튀검증 완료 안전놀이터 메이저사이트 토토사이트 순위",
        "바카라사이트 슬롯사이트 파워볼게임 실시간 배팅 첫충 30% 매충 10%",
        "우리카지노 에볼루션카지노 무제재 입플 롤링 콤프 지급합니다",
        "지금 가입하시면 카지노쿠폰 즉시 지급해 드리고 환전은 5분 안에 해 드립니다.",
        "안녕하세요 회원님 사설토토 총판 모집 중입니다. 텔레그램 문의 주세요.",
    ]
    chosen = rng.sample(parts, rng.randint(3, 6))
    if rng.random() < 0.3:
        chosen.insert(0, prose(rng, "diary", 1))
    return rng.choice([" ", "\n"]).join(chosen)


def adult(rng: random.Random) -> str:
    """An advertisement of adult services."""
    city = rng.choice(CITIES)
    parts = [
        f"{city}출장안마 {city}출장샵 {city}출장마사지 후불 24시간 예약",
        f"{city} 조건만남 애인대행 즉석만남 콜걸 후기 많은 곳입니다",
        "야동 무료 성인사이트 국산 19금 영상 매일 업데이트합니다",
        "비아그라 구매 시알리스 판매 정품 최음제 당일 배송해 드립니다",
        "오피사이트 풀싸롱 셔츠룸 휴게텔 키스방 가격 안내",
        "외로운 밤 화상채팅 폰섹 벗방으로 오세요",
    ]
    return rng.choice([" ", "\n"]).join(rng.sample(parts, rng.randint(3, 6)))


def advertisement(rng: random.Random) -> str:
    """A loan, investment or sales pitch."""
    parts = [
        f"무직자대출 당일대출 소액결제 현금화 최대 {rng.randint(3, 9)}천만 원 신용불량자 가능합니다.",
        "급전대출 개인돈 일수대출 24시간 상담 카톡문의 주세요!",
        "리딩방 무료리딩 급등주 추천 수익보장 원금보장 지금 신청하세요!!",
        "고수익알바 재택알바 누구나 가능 당일 지급해 드립니다.",
        "특가 할인 한정수량 사은품 증정 최저가 보장 지금 바로 클릭하세요!",
        "흥신소 심부름센터 비밀보장 무료상담 카톡상담 환영합니다.",
    ]
    return rng.choice([" ", "\n"]).join(rng.sample(parts, rng.randint(3, 6)))


def keywords(rng: random.Random) -> str:
    """A page that repeats its search words."""
    city, thing = (
        rng.choice(CITIES),
        rng.choice(["인테리어", "이삿짐센터", "치과", "맛집", "필라테스", "중고차", "웨딩홀", "네일"]),
    )
    frames = [
        "{k} 잘하는 곳을 찾고 계신가요?",
        "{k} 가격이 궁금하시죠.",
        "오늘은 {k} 후기를 알려 드릴게요.",
        "{k} 비용은 업체마다 다릅니다.",
        "역시 {k} 하면 여기입니다.",
        "{k} 예약은 서두르세요.",
        "많은 분이 {k} 때문에 고민합니다.",
        "{k} 전문 업체를 소개합니다.",
    ]
    rng.shuffle(frames)
    return " ".join(frame.format(k=f"{city} {thing} 추천") for frame in frames)


def repeated_lines(rng: random.Random) -> str:
    """A board whose signature or title stands again and again."""
    line = fill(rng, rng.choice(QUESTION))
    lines = [line] * rng.randint(4, 9) + [fill(rng, sentence) for sentence in rng.sample(QUESTION, 3)]
    rng.shuffle(lines)
    return "\n".join(lines)


def repeated_paragraphs(rng: random.Random) -> str:
    """A text that was pasted several times."""
    return " ".join([prose(rng, rng.choice(["news", "novel", "technical"]), 4).replace("\n", " ")] * rng.randint(2, 5))


def unspaced_repetition(rng: random.Random) -> str:
    """A phrase that repeats without the same spaces: words differ, characters do not."""
    phrase = prose(rng, "diary", 2).replace("\n", "").replace(" ", "")
    copies = []
    for _ in range(rng.randint(4, 7)):
        cuts = sorted(rng.sample(range(2, len(phrase)), len(phrase) // 4))
        copies.append(" ".join(phrase[a:b] for a, b in zip([0, *cuts], [*cuts, len(phrase)], strict=True)))
    return " ".join(copies)


def english(rng: random.Random) -> str:
    """English, with a Korean word or two."""
    return " ".join([*rng.sample(ENGLISH, 4), "안녕하세요", rng.choice(CITIES)])


def japanese(rng: random.Random) -> str:
    """Japanese in a Korean page."""
    return "\n".join([*rng.sample(JAPANESE, 3), *prose(rng, "question", 2).split("\n")])


def broken(rng: random.Random) -> str:
    """Text that went through a wrong decoder."""
    text = prose(rng)
    for _ in range(rng.randint(2, 6)):
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(["\ufffd", "占쏙옙", "\ufffd\ufffd", "\ue123"]) + text[place + 1 :]
    return text


def html(rng: random.Random) -> str:
    """The source of a page."""
    rows = "".join(
        f'<tr class="row{n}"><td width="120">{rng.choice(GOODS)}</td><td><a href="/shop/view.php?no={n}">'
        f"{rng.choice(CITIES)} "
        "매장에서 보기</a></td></tr>"
        for n in range(rng.randint(5, 12))
    )
    return f'<html><body bgcolor="#ffffff"><table border="0" cellpadding="0">{rows}</table>&nbsp;&copy;</body></html>'


def ornaments(rng: random.Random) -> str:
    """A notice made of ornaments."""
    mark = rng.choice(["★", "♥", "■", "▶", "◈", "♣"])
    return "\n".join(
        f"{mark * 4} {rng.choice(GOODS)} {rng.choice(['대방출', '균일가', '입고', '마감임박'])} {mark * 4}"
        for _ in range(8)
    )


def table(rng: random.Random) -> str:
    """A table of numbers."""
    return "\n".join(
        f"{rng.choice(GOODS)} {rng.randint(1000, 99999)} {rng.randint(10, 999)} {rng.randint(100000, 9999999)} "
        f"{rng.randint(0, 99)}.{rng.randint(10, 99)}"
        for _ in range(rng.randint(8, 20))
    )


def short(rng: random.Random) -> str:
    """Too little to learn from."""
    return fill(
        rng,
        rng.choice(
            [
                "네 감사합니다 {name}님.",
                "{city} 여행 후기",
                "좋은 글이네요!",
                "{food} 맛있어요",
                "1등 ㅋㅋ",
                "자료 잘 받았습니다.",
            ]
        ),
    )


def previews(rng: random.Random) -> str:
    """A list of articles that stand elsewhere."""
    pool = [sentence for genre in ("news", "law", "health", "novel") for sentence in GENRES[genre]]
    return "\n".join(
        fill(rng, sentence)[: rng.randint(18, 30)] + rng.choice(["...", "…"]) for sentence in rng.sample(pool, 9)
    )


def bullets(rng: random.Random) -> str:
    """A list of goods."""
    mark = rng.choice(["- ", "• ", "■ ", "▶ ", "* "])
    return "\n".join(
        f"{mark}{rng.choice(COLOURS)} {rng.choice(GOODS)} 신규 입고 상품" for _ in range(rng.randint(12, 20))
    )


def error_page(rng: random.Random) -> str:
    """A page without content."""
    pages = [
        "페이지를 찾을 수 없습니다.\n요청하신 페이지가 삭제되었거나 주소가 변경되었습니다."
        "\n입력하신 주소를 다시 확인해 주세요.\n이용에 불편을 드려 죄송합니다.",
        "등록된 게시물이 없습니다.\n검색 결과가 없습니다. 다른 검색어를 입력해 보세요."
        "\n처음으로 돌아가기를 누르면 첫 화면으로 이동합니다.",
        "이 사이트는 자바스크립트를 사용할 수 없는 환경에서는 정상적으로 표시되지 않습니다."
        "\n브라우저를 업데이트하거나 자바스크립트를 활성화한 뒤에 다시 시도해 주세요.",
        "안녕하세요 {이름} 고객님, [상품명] 상품을 주문해 주셔서 감사합니다."
        "\n{이름} 고객님의 [상품명] 상품은 곧 발송될 예정입니다.\n[업체명] 드림",
        "홈페이지 점검 중입니다. 보다 나은 서비스를 위하여 준비 중입니다."
        "\n로그인 후 이용하실 수 있는 화면입니다. 권한이 필요합니다.",
        "여기에 내용을 입력하세요. 본문 내용이 들어갑니다. 텍스트를 입력하세요."
        "\nLorem ipsum dolor sit amet 샘플 텍스트입니다. 이 글은 예시입니다.",
    ]
    return rng.choice(pages) + rng.choice(
        ["", "\n확인", "\n닫기", "\n이전 화면으로", "\n다시 시도", "\n문의는 게시판에 남겨 주세요."]
    )


def unspaced(rng: random.Random) -> str:
    """Text without spaces."""
    return prose(rng, sentences=4).replace(" ", "").replace("\n", "")


def spaced_out(rng: random.Random) -> str:
    """A space after every syllable."""
    return " ".join(prose(rng, sentences=4).replace(" ", "").replace("\n", ""))


def links(rng: random.Random) -> str:
    """A list of links with short names."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    return "\n".join(
        f"{rng.choice(GOODS)} 상품 바로 보러 가기 https://shop.example.com/item/{''.join(rng.choices(letters, k=30))}"
        for _ in range(8)
    )


def chat(rng: random.Random) -> str:
    """A chat log of jamo."""
    turns = [
        "ㅇㅇ",
        "ㅋㅋㅋㅋ",
        "ㄴㄴ ㄱㄱ",
        "ㅇㅈ ㅋㅋ",
        "ㅎㅇ",
        "ㅂㅂ ㅅㄱ",
        "ㄹㅇㅋㅋ",
        "아 ㅋㅋ",
        "ㅠㅠ ㅈㅅ",
        "ㄱㅅ",
        "뭐함 ㅋ",
        "ㅁㄹ ㅎㅎ",
    ]
    return "\n".join(f"{rng.choice(turns)} {rng.choice(turns)}" for _ in range(rng.randint(16, 24)))


def catalogue(rng: random.Random) -> str:
    """A page of goods with prices."""
    return "\n".join(
        f"{rng.choice(COLOURS)} {rng.choice(GOODS)} {rng.choice(COLOURS)} {rng.choice(GOODS)} 세트 "
        f"무료배송 {rng.randint(10, 99)},900원"
        for _ in range(rng.randint(10, 16))
    )


def hate(rng: random.Random) -> str:
    """Abuse of a group; dropped only where the user turns the rule on."""
    words = ["맘충", "틀딱", "짱깨", "급식충", "한남충", "김치녀", "개독교", "난민충"]
    lines = [
        f"요즘 {rng.choice(words)}들 때문에 어디를 가도 짜증이 난다.",
        f"진짜 {rng.choice(words)}은 다 없어져야 한다고 생각한다.",
        f"{rng.choice(words)}들이 또 저러고 있네 한심하다.",
    ]
    return " ".join([*lines, prose(rng, "diary", 2).replace("\n", " ")])


def code(rng: random.Random) -> str:
    """A program with Korean comments; dropped only where the user turns the rule on."""
    name = rng.choice(["count", "total", "price", "score"])
    return (
        f"# {rng.choice(GOODS)} 목록을 읽어서 합계를 계산하는 함수이다\ndef read_{name}(path):\n    {name} = 0\n"
        f"    for line in open(path):  # 한 줄씩 읽는다\n        {name} += int(line.split(',')[{rng.randint(0, 5)}])\n"
        f"    return {name}  # 결과를 돌려준다\n\nif __name__ == '__main__':\n"
        f"    print('합계는 다음과 같습니다', read_{name}('자료.csv'))"
    )


BAD: dict[str, tuple[Callable[[random.Random], str], tuple[str, ...]]] = {
    "menu": (menu, ("boilerplate_lines", "grammar_ratio")),
    "gambling": (gambling, ("gambling_words",)),
    "adult": (adult, ("adult_words",)),
    "advertisement": (advertisement, ("advertising_words",)),
    "keywords": (keywords, ("top_bigram", "top_trigram")),
    "repeated lines": (repeated_lines, ("duplicate_lines",)),
    "repeated paragraphs": (repeated_paragraphs, ("duplicate_ngrams", "duplicate_windows")),
    "unspaced repetition": (unspaced_repetition, ("duplicate_windows",)),
    "english": (english, ("korean_ratio",)),
    "japanese": (japanese, ("foreign_ratio",)),
    "broken": (broken, ("broken_ratio",)),
    "html": (html, ("markup_ratio", "symbol_ratio")),
    "ornaments": (ornaments, ("symbol_ratio",)),
    "table": (table, ("digit_ratio",)),
    "short": (short, ("length",)),
    "previews": (previews, ("ellipsis_lines",)),
    "bullets": (bullets, ("bullet_lines",)),
    "error page": (error_page, ("template_lines",)),
    "unspaced": (unspaced, ("eojeol_length", "long_eojeol")),
    "spaced out": (spaced_out, ("eojeol_length",)),
    "links": (links, ("long_eojeol",)),
    "chat": (chat, ("jamo_ratio",)),
    "catalogue": (catalogue, ("sentence_lines", "grammar_ratio")),
}
OPTIONAL = {"hate": (hate, ("hate_words",)), "code": (code, ("code_lines",))}


def bad_documents(count_per_kind: int, seed: int, kinds=None) -> list[Labelled]:
    """Bad documents, so many of each kind."""
    rng = random.Random(seed)
    return [
        Labelled(make(rng), kind, False, rules)
        for kind, (make, rules) in (kinds or BAD).items()
        for _ in range(count_per_kind)
    ]
