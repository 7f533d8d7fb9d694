-- An SQLite file as version 1.0 wrote it: what test_store.py opens.
BEGIN TRANSACTION;
CREATE TABLE message (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    conversation TEXT NOT NULL,
    data TEXT,
    asker TEXT,
    state TEXT NOT NULL,
    accepted REAL NOT NULL,
    due REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    token TEXT,
    reply TEXT,
    progress TEXT,
    remember INTEGER NOT NULL DEFAULT 1,
    stop INTEGER NOT NULL DEFAULT 0,
    ended REAL,
    reason TEXT
);
INSERT INTO "message" VALUES(1,'done','c2c	@RBT#001	jared','{"id": "done", "robot": "@RBT#001", "user": "jared", "text": "text of done", "group": "", "topic": "", "images": [], "kind": "question"}','jared','done',1700000000.0,1700000015.0,1,NULL,'"an answer"',NULL,1,0,1700000000.0,NULL);
INSERT INTO "message" VALUES(2,'gone','c2c	@RBT#001	jared',NULL,'jared','gone',1700000000.0,1700000015.0,1,NULL,NULL,NULL,1,0,1700000000.0,NULL);
INSERT INTO "message" VALUES(3,'failed','c2c	@RBT#001	jared','{"id": "failed", "robot": "@RBT#001", "user": "jared", "text": "text of failed", "group": "", "topic": "", "images": [], "kind": "question"}','jared','failed',1700000000.0,1700000015.0,1,NULL,'"unsent"','{"sent": 1}',1,0,1700000000.0,'IM 20003: no such user');
INSERT INTO "message" VALUES(4,'half sent','c2c	@RBT#001	jared','{"id": "half sent", "robot": "@RBT#001", "user": "jared", "text": "text of half sent", "group": "", "topic": "", "images": [], "kind": "question"}','jared','next',1700000000.0,1700000015.0,2,'28505d9ee53541ce92c7e79b5f710b4b','"a long answer"','{"sent": 2}',1,0,NULL,NULL);
INSERT INTO "message" VALUES(5,'waiting 1','c2c	@RBT#001	jared','{"id": "waiting 1", "robot": "@RBT#001", "user": "jared", "text": "text of waiting 1", "group": "", "topic": "", "images": [], "kind": "question"}','jared','waiting',1700000000.0,1700000000.0,0,NULL,NULL,NULL,1,0,NULL,NULL);
INSERT INTO "message" VALUES(6,'waiting 2','c2c	@RBT#001	jared','{"id": "waiting 2", "robot": "@RBT#001", "user": "jared", "text": "text of waiting 2", "group": "", "topic": "", "images": [], "kind": "strange"}','jared','waiting',1700000000.0,1700000000.0,0,NULL,NULL,NULL,1,0,NULL,NULL);
INSERT INTO "message" VALUES(7,'held','c2c	@RBT#001	lin','{"id": "held", "robot": "@RBT#001", "user": "lin", "text": "text of held", "group": "", "topic": "", "images": [], "kind": "question"}','lin','next',1700000000.0,1700000015.0,1,'7c03769b3c1147cfb13f2f70fc6e3bca',NULL,NULL,1,1,NULL,NULL);
INSERT INTO "message" VALUES(8,'behind it','c2c	@RBT#001	lin','{"id": "behind it", "robot": "@RBT#001", "user": "lin", "text": "text of behind it", "group": "", "topic": "", "images": [], "kind": "question"}','lin','waiting',1700000000.0,1700000000.0,0,NULL,NULL,NULL,1,0,NULL,NULL);
INSERT INTO "message" VALUES(9,'flood	jared	1','c2c	@RBT#001	jared	notice',NULL,'jared','gone',1700000000.0,1700000015.0,1,NULL,NULL,NULL,1,0,1700000000.0,NULL);
INSERT INTO "message" VALUES(10,'flood	jared	2','c2c	@RBT#001	jared	notice','{"id": "flood\tjared\t2", "robot": "@RBT#001", "user": "jared", "text": "text of flood\tjared\t2", "group": "", "topic": "", "images": [], "kind": "flood"}','jared','next',1700000000.0,1700000000.0,0,NULL,NULL,NULL,1,0,NULL,NULL);
CREATE INDEX message_due ON message (due, token, accepted)
    WHERE state = 'next';
CREATE INDEX message_turn ON message (state, conversation, seq);
CREATE INDEX message_ended ON message (ended) WHERE ended IS NOT NULL;
CREATE INDEX message_asked ON message (asker, accepted)
    WHERE asker IS NOT NULL;
CREATE TRIGGER message_ends AFTER UPDATE OF state ON message
    WHEN old.state = 'next' AND new.state != 'next' BEGIN
    UPDATE message SET state = 'next' WHERE seq = (SELECT min(seq) FROM message
        WHERE state = 'waiting' AND conversation = new.conversation);
END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('message',10);
COMMIT;
