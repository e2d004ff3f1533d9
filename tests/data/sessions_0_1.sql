BEGIN TRANSACTION;
CREATE TABLE adapters (
	name VARCHAR NOT NULL, 
	tenant VARCHAR(64) NOT NULL, 
	session VARCHAR NOT NULL, 
	number INTEGER NOT NULL, 
	path VARCHAR NOT NULL, 
	state VARCHAR(32) NOT NULL, 
	updated_at FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "adapters" VALUES('adapter-alpha-1','8254c329a92850f6','alpha~6513270e269e',1,'/adapters/soma-train-1','ACTIVE',1790000000.5625);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE api_keys (
	id VARCHAR(32) NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	tenant VARCHAR(64) NOT NULL, 
	limits JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	revoked_at FLOAT, 
	PRIMARY KEY (id)
);
INSERT INTO "api_keys" VALUES('0123456789ab','Ana','806ad210c81a05fd328cd07776c574a1e11a1207151bc1d661ef39b7cd16cb90','806ad210c81a05fd','{"requests_per_minute": 60}',1790000000.9375,NULL);
CREATE TABLE events (
	tenant VARCHAR(64) NOT NULL, 
	session VARCHAR NOT NULL, 
	seq INTEGER NOT NULL, 
	kind VARCHAR(32) NOT NULL, 
	at FLOAT NOT NULL, 
	data TEXT NOT NULL, 
	PRIMARY KEY (tenant, session, seq)
);
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',0,'turn',1.79000000001562499995e+09,'{"number":1,"engine":"original","adapter":null,"phase":"WARM_START","reason":"warm start 1 of 2","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.017429281999284285,"most_tokens":null,"complete":true,"chain":"b502a4e6f7eabdd5932ab761dd30f882905ca6b05d9b067662bdd4e75f6ff8bd","asked":"d704d098e0c54187bc4b027cde06f77e6104db04ca9f57a6707fd5af4a89f5ee","links":["d704d098e0c541872b50bc396b8bde8a"],"left_out":null,"response":null,"skip":null,"builds_on":0}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',1,'turn',1790000000.0625,'{"number":2,"engine":"original","adapter":null,"phase":"WARM_START","reason":"warm start 2 of 2","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.0004790479997609509,"most_tokens":null,"complete":true,"chain":"823017d2ef4a613dbd0e71a25d9757a60af666a37bece6b80f68bb3950a4e8b7","asked":"6168b0e92e9213b91e325b35f342570b93d9649c25675d2aca81d14ea9253276","links":["6416ce6338fd7aac2b50bc396b8bde8a"],"left_out":null,"response":null,"skip":null,"builds_on":1}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',2,'adaptation_started',1.79000000007812500001e+09,'{"forced":null,"adapting":{"policy":"soma","gate":true,"mining":true}}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',3,'training_submitted',1.79000000014062499997e+09,'{"turns":[1],"teacher":"text","why":"the original is not known to be a vLLM (original.api)"}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',4,'trained',1790000000.15625,'{"mining_s":0.1,"finetune_s":0.2,"scoring_s":0.3,"steps":4,"distilled":false,"flops":1.0,"losses":[1.0,0.5],"hardness":{"1":1.0},"checkpoints":[{"steps":0,"nll":1.0,"top1":0.5},{"steps":4,"nll":0.5,"top1":0.8}],"plain":{"nll":1.0,"top1":0.5,"tokens":10},"adapted":{"nll":0.5,"top1":0.8,"tokens":10}}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',5,'adapter_published',1790000000.1875,'{"adapter":{"name":"adapter-alpha-1","number":1,"path":"/adapters/soma-train-1"}}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',6,'adapter_loaded',1.79000000020312499994e+09,'{"adapter":{"name":"adapter-alpha-1","number":1,"path":"/adapters/soma-train-1"}}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',7,'judged',1790000000.21875,'{"candidate":"adapter","reason":"gap 0.000 within 0.1","numbers":{"candidates":{"plain":{"turns":[2],"gaps":[0.0],"mean_gap":0.0,"passes":true,"failure":null,"nll":1.0,"top1":0.5},"adapter":{"turns":[2],"gaps":[0.0],"mean_gap":0.0,"passes":true,"failure":null,"nll":0.5,"top1":0.8}},"accept_threshold":0.1,"setbacks":0,"accept_margin":0.0,"min_agreement":0.0,"min_gain":0.1,"min_turns":1}}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',8,'switched',1.79000000023437499992e+09,'{"candidate":"adapter","reason":"gap 0.000 within 0.1","adapter":{"name":"adapter-alpha-1","number":1,"path":"/adapters/soma-train-1"},"centroid":[1.0,0.0,0.0]}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',9,'turn',1.79000000035937499999e+09,'{"number":3,"engine":"surrogate","adapter":"adapter-alpha-1","phase":"SWITCHED","reason":"switched to adapter, distance 0.00","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.0007275440002558753,"most_tokens":null,"complete":true,"chain":"2033cf21c14fd91e7ea18c0ec8ef5ebaf5bb82c2bef44c953803cb62f223b194","asked":"044d0d9af762c28cfa2f97173fbb5247cde28fffb36641f9c92ed2b511dd3d34","links":["90cf619e292052682b50bc396b8bde8a"],"left_out":null,"response":null,"skip":"the original did not answer it","builds_on":2}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha',10,'audited',1.79000000039062499997e+09,'{"turn":3,"kind":"gap","gap":0.0,"surprise":null,"top1":null,"served_by":"surrogate"}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha~6513270e269e',0,'branched',1790000000.40625,'{"of":"alpha","family":"alpha","rollbacks":0,"refusals":0,"cool_downs":0,"learned":2,"turns":[{"number":1,"engine":"original","adapter":null,"phase":"WARM_START","reason":"warm start 1 of 2","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.017429281999284285,"most_tokens":null,"complete":true,"chain":"b502a4e6f7eabdd5932ab761dd30f882905ca6b05d9b067662bdd4e75f6ff8bd","asked":"d704d098e0c54187bc4b027cde06f77e6104db04ca9f57a6707fd5af4a89f5ee","links":["d704d098e0c541872b50bc396b8bde8a"],"left_out":null,"response":null,"skip":null,"builds_on":0},{"number":2,"engine":"original","adapter":null,"phase":"WARM_START","reason":"warm start 2 of 2","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.0004790479997609509,"most_tokens":null,"complete":true,"chain":"823017d2ef4a613dbd0e71a25d9757a60af666a37bece6b80f68bb3950a4e8b7","asked":"6168b0e92e9213b91e325b35f342570b93d9649c25675d2aca81d14ea9253276","links":["6416ce6338fd7aac2b50bc396b8bde8a"],"left_out":null,"response":null,"skip":null,"builds_on":1}]}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha~6513270e269e',1,'inherited',1790000000.40625,'{"candidate":"adapter","reason":"learned from the first 2 turns, which both branches have","adapter":{"name":"adapter-alpha-1","number":1,"path":"/adapters/soma-train-1"},"centroid":[1.0,0.0,0.0],"learned":2,"adapting":{"policy":"soma","gate":true,"mining":true}}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha~6513270e269e',2,'turn',1.79000000042187499996e+09,'{"number":3,"engine":"surrogate","adapter":"adapter-alpha-1","phase":"SWITCHED","reason":"switched to adapter, distance 0.00","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.009884815000987146,"most_tokens":null,"complete":true,"chain":"a1efa07921bd7d55c53166b16bc1fa50fe79cb62e5469ce1920f0c42cec7e1a0","asked":"1471ff20662bf104cd0cfaf784f45291fd1343df501234462c2e5a4abc7a02f0","links":["c21f305e6e013f162b50bc396b8bde8a"],"left_out":null,"response":null,"skip":"the original did not answer it","builds_on":2}');
INSERT INTO "events" VALUES('8254c329a92850f6','alpha~6513270e269e',3,'audited',1790000000.4375,'{"turn":3,"kind":"gap","gap":0.0,"surprise":null,"top1":null,"served_by":"surrogate"}');
INSERT INTO "events" VALUES('8254c329a92850f6','beta',0,'turn',1790000000.46875,'{"number":1,"engine":"original","adapter":null,"phase":"WARM_START","reason":"warm start 1 of 2","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.004900699999780045,"most_tokens":null,"complete":true,"chain":"b502a4e6f7eabdd5932ab761dd30f882905ca6b05d9b067662bdd4e75f6ff8bd","asked":"d704d098e0c54187bc4b027cde06f77e6104db04ca9f57a6707fd5af4a89f5ee","links":["d704d098e0c541872b50bc396b8bde8a"],"left_out":null,"response":null,"skip":null,"builds_on":0}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',0,'turn',1.79000000048437500005e+09,'{"number":1,"engine":"original","adapter":null,"phase":"WARM_START","reason":"warm start 1 of 2","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.0034872590003942605,"most_tokens":null,"complete":true,"chain":"b502a4e6f7eabdd5932ab761dd30f882905ca6b05d9b067662bdd4e75f6ff8bd","asked":"d704d098e0c54187bc4b027cde06f77e6104db04ca9f57a6707fd5af4a89f5ee","links":["d704d098e0c541872b50bc396b8bde8a"],"left_out":null,"response":null,"skip":null,"builds_on":0}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',1,'turn',1790000000.53125,'{"number":2,"engine":"original","adapter":null,"phase":"WARM_START","reason":"warm start 2 of 2","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.00038828799915791024,"most_tokens":null,"complete":true,"chain":"823017d2ef4a613dbd0e71a25d9757a60af666a37bece6b80f68bb3950a4e8b7","asked":"6168b0e92e9213b91e325b35f342570b93d9649c25675d2aca81d14ea9253276","links":["6416ce6338fd7aac2b50bc396b8bde8a"],"left_out":null,"response":null,"skip":null,"builds_on":1}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',2,'adaptation_started',1.79000000054687500002e+09,'{"forced":null,"adapting":{"policy":"soma","gate":true,"mining":true}}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',3,'judged',1.790000000578125e+09,'{"candidate":"plain","reason":"gap 0.000 within 0.1","numbers":{"candidates":{"plain":{"turns":[1,2],"gaps":[0.0,0.0],"mean_gap":0.0,"passes":true,"failure":null}},"accept_threshold":0.1,"setbacks":0,"accept_margin":0.0,"min_agreement":0.0,"min_gain":0.1,"min_turns":1}}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',4,'switched',1790000000.59375,'{"candidate":"plain","reason":"gap 0.000 within 0.1","adapter":null,"centroid":[1.0,0.0,0.0]}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',5,'turn',1.79000000060937499999e+09,'{"number":3,"engine":"surrogate","adapter":null,"phase":"SWITCHED","reason":"switched to plain, distance 0.00","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.002921548999438528,"most_tokens":null,"complete":true,"chain":"2033cf21c14fd91e7ea18c0ec8ef5ebaf5bb82c2bef44c953803cb62f223b194","asked":"044d0d9af762c28cfa2f97173fbb5247cde28fffb36641f9c92ed2b511dd3d34","links":["90cf619e292052682b50bc396b8bde8a"],"left_out":null,"response":null,"skip":"the original did not answer it","builds_on":2}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',6,'audited',1790000000.625,'{"turn":3,"kind":"gap","gap":0.0,"surprise":null,"top1":null,"served_by":"surrogate"}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',7,'turn',1.79000000064062499997e+09,'{"number":4,"engine":"surrogate","adapter":null,"phase":"SWITCHED","reason":"switched to plain, distance 0.00","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.0006271660004131263,"most_tokens":null,"complete":true,"chain":"69adf6725f23e34ac4485343d15b6666ee137f00a76333396cf3e364c3fd6f9c","asked":"885759eccc44cd665d40a5ec5239dfd2fc5fba3ab235e13371462b894fdfc813","links":["68b89b033dc2e8542b50bc396b8bde8a"],"left_out":null,"response":null,"skip":"the original did not answer it","builds_on":3}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',8,'audited',1790000000.65625,'{"turn":4,"kind":"gap","gap":1.0,"surprise":null,"top1":null,"served_by":"surrogate"}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',9,'turn',1.79000000067187500004e+09,'{"number":5,"engine":"surrogate","adapter":null,"phase":"SWITCHED","reason":"switched to plain, distance 0.00","usage":{"prompt_tokens":1,"cached_tokens":null,"completion_tokens":2},"ttft_s":null,"latency_s":0.0003523110008245567,"most_tokens":null,"complete":true,"chain":"6af9ec5598e85d39659ce8876c6fec16c3bf682ba87976fc18fad78ac7107cf9","asked":"4967308ba1ffee48e060c06ac6301d5d74347fdf24ca4a3c415e4ca441ca5791","links":["b9895d6e562bccfa2b50bc396b8bde8a"],"left_out":null,"response":null,"skip":"the original did not answer it","builds_on":4}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',10,'audited',1.79000000070312500002e+09,'{"turn":5,"kind":"gap","gap":1.0,"surprise":null,"top1":null,"served_by":"surrogate"}');
INSERT INTO "events" VALUES('8254c329a92850f6','gamma',11,'rolled_back',1790000000.71875,'{"moving":3.3333,"window":[{"kind":"gap","value":1.0,"relative":3.3333333333333335}],"breaches":2,"drift_threshold":0.3,"surprise_threshold":2.0}');
CREATE TABLE sessions (
	tenant VARCHAR(64) NOT NULL, 
	session VARCHAR NOT NULL, 
	family VARCHAR NOT NULL, 
	phase VARCHAR(32) NOT NULL, 
	chain VARCHAR(64) NOT NULL, 
	turns INTEGER NOT NULL, 
	adapter VARCHAR, 
	updated_at FLOAT NOT NULL, 
	PRIMARY KEY (tenant, session)
);
INSERT INTO "sessions" VALUES('8254c329a92850f6','alpha','alpha','SWITCHED','2033cf21c14fd91e7ea18c0ec8ef5ebaf5bb82c2bef44c953803cb62f223b194',3,'adapter-alpha-1',1.79000000045312500007e+09);
INSERT INTO "sessions" VALUES('8254c329a92850f6','alpha~6513270e269e','alpha','SWITCHED','a1efa07921bd7d55c53166b16bc1fa50fe79cb62e5469ce1920f0c42cec7e1a0',3,'adapter-alpha-1',1790000000.6875);
INSERT INTO "sessions" VALUES('8254c329a92850f6','beta','beta','WARM_START','b502a4e6f7eabdd5932ab761dd30f882905ca6b05d9b067662bdd4e75f6ff8bd',1,NULL,1.79000000073437500001e+09);
INSERT INTO "sessions" VALUES('8254c329a92850f6','gamma','gamma','ROLLED_BACK','6af9ec5598e85d39659ce8876c6fec16c3bf682ba87976fc18fad78ac7107cf9',5,NULL,1.790000000921875e+09);
CREATE TABLE texts (
	tenant VARCHAR(64) NOT NULL, 
	session VARCHAR NOT NULL, 
	seq INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	data TEXT NOT NULL, 
	PRIMARY KEY (tenant, session, seq)
);
INSERT INTO "texts" VALUES('8254c329a92850f6','alpha',0,1.79000000001562499995e+09,'{"messages":[{"role":"user","content":"question 1"}],"answer":"same","calls":[]}');
INSERT INTO "texts" VALUES('8254c329a92850f6','alpha',1,1790000000.0625,'{"messages":[{"role":"user","content":"question 2"}],"answer":"same","calls":[]}');
INSERT INTO "texts" VALUES('8254c329a92850f6','alpha',9,1.79000000035937499999e+09,'{"messages":[{"role":"user","content":"question 3"}],"answer":"same","calls":[]}');
INSERT INTO "texts" VALUES('8254c329a92850f6','alpha~6513270e269e',0,1790000000.40625,'{"turns":[{"messages":[{"role":"user","content":"question 1"}],"answer":"same","calls":[]},{"messages":[{"role":"user","content":"question 2"}],"answer":"same","calls":[]}]}');
INSERT INTO "texts" VALUES('8254c329a92850f6','alpha~6513270e269e',2,1.79000000042187499996e+09,'{"messages":[{"role":"user","content":"question 3, said otherwise"}],"answer":"same","calls":[]}');
INSERT INTO "texts" VALUES('8254c329a92850f6','beta',0,1790000000.46875,'{"messages":[{"role":"user","content":"question 1"}],"answer":"same","calls":[]}');
INSERT INTO "texts" VALUES('8254c329a92850f6','gamma',0,1.79000000048437500005e+09,'{"messages":[{"role":"user","content":"question 1"}],"answer":"same","calls":[]}');
INSERT INTO "texts" VALUES('8254c329a92850f6','gamma',1,1790000000.53125,'{"messages":[{"role":"user","content":"question 2"}],"answer":"same","calls":[]}');
INSERT INTO "texts" VALUES('8254c329a92850f6','gamma',5,1.79000000060937499999e+09,'{"messages":[{"role":"user","content":"question 3"}],"answer":"same","calls":[]}');
INSERT INTO "texts" VALUES('8254c329a92850f6','gamma',7,1.79000000064062499997e+09,'{"messages":[{"role":"user","content":"question 4"}],"answer":"same","calls":[]}');
INSERT INTO "texts" VALUES('8254c329a92850f6','gamma',9,1.79000000067187500004e+09,'{"messages":[{"role":"user","content":"question 5"}],"answer":"same","calls":[]}');
CREATE TABLE turns (
	tenant VARCHAR(64) NOT NULL, 
	session VARCHAR NOT NULL, 
	seq INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	family VARCHAR NOT NULL, 
	chain VARCHAR(64) NOT NULL, 
	response VARCHAR, 
	at FLOAT NOT NULL, link VARCHAR(32), 
	PRIMARY KEY (tenant, session, seq, number)
);
INSERT INTO "turns" VALUES('8254c329a92850f6','alpha',0,1,'alpha','b502a4e6f7eabdd5932ab761dd30f882905ca6b05d9b067662bdd4e75f6ff8bd',NULL,1.79000000001562499995e+09,'d704d098e0c541872b50bc396b8bde8a');
INSERT INTO "turns" VALUES('8254c329a92850f6','alpha',1,2,'alpha','823017d2ef4a613dbd0e71a25d9757a60af666a37bece6b80f68bb3950a4e8b7',NULL,1790000000.0625,'6416ce6338fd7aac2b50bc396b8bde8a');
INSERT INTO "turns" VALUES('8254c329a92850f6','alpha',9,3,'alpha','2033cf21c14fd91e7ea18c0ec8ef5ebaf5bb82c2bef44c953803cb62f223b194',NULL,1.79000000035937499999e+09,'90cf619e292052682b50bc396b8bde8a');
INSERT INTO "turns" VALUES('8254c329a92850f6','alpha~6513270e269e',2,3,'alpha','a1efa07921bd7d55c53166b16bc1fa50fe79cb62e5469ce1920f0c42cec7e1a0',NULL,1.79000000042187499996e+09,'c21f305e6e013f162b50bc396b8bde8a');
INSERT INTO "turns" VALUES('8254c329a92850f6','beta',0,1,'beta','b502a4e6f7eabdd5932ab761dd30f882905ca6b05d9b067662bdd4e75f6ff8bd',NULL,1790000000.46875,'d704d098e0c541872b50bc396b8bde8a');
INSERT INTO "turns" VALUES('8254c329a92850f6','gamma',0,1,'gamma','b502a4e6f7eabdd5932ab761dd30f882905ca6b05d9b067662bdd4e75f6ff8bd',NULL,1.79000000048437500005e+09,'d704d098e0c541872b50bc396b8bde8a');
INSERT INTO "turns" VALUES('8254c329a92850f6','gamma',1,2,'gamma','823017d2ef4a613dbd0e71a25d9757a60af666a37bece6b80f68bb3950a4e8b7',NULL,1790000000.53125,'6416ce6338fd7aac2b50bc396b8bde8a');
INSERT INTO "turns" VALUES('8254c329a92850f6','gamma',5,3,'gamma','2033cf21c14fd91e7ea18c0ec8ef5ebaf5bb82c2bef44c953803cb62f223b194',NULL,1.79000000060937499999e+09,'90cf619e292052682b50bc396b8bde8a');
INSERT INTO "turns" VALUES('8254c329a92850f6','gamma',7,4,'gamma','69adf6725f23e34ac4485343d15b6666ee137f00a76333396cf3e364c3fd6f9c',NULL,1.79000000064062499997e+09,'68b89b033dc2e8542b50bc396b8bde8a');
INSERT INTO "turns" VALUES('8254c329a92850f6','gamma',9,5,'gamma','6af9ec5598e85d39659ce8876c6fec16c3bf682ba87976fc18fad78ac7107cf9',NULL,1.79000000067187500004e+09,'b9895d6e562bccfa2b50bc396b8bde8a');
CREATE INDEX ix_sessions_updated_at ON sessions (updated_at);
CREATE INDEX ix_sessions_tenant ON sessions (tenant, updated_at);
CREATE INDEX ix_sessions_adapter ON sessions (adapter);
CREATE INDEX ix_texts_at ON texts (at);
CREATE INDEX ix_turns_chain ON turns (tenant, family, chain);
CREATE INDEX ix_turns_response ON turns (tenant, response);
CREATE INDEX ix_adapters_session ON adapters (tenant, session);
CREATE INDEX ix_turns_link ON turns (tenant, family, link);
COMMIT;
