-- The tables of mysql_jobcache: names, columns and meaning as documented for Salt's mysql returner,
-- with primary keys, four-byte UTF-8 and texts of up to 4 GiB. What is added stands after what was there.
--
-- jid and id compare byte by byte, trailing spaces too: web1, Web1 and 'web1 ' are three minions. The collation that does
-- so has another name on MariaDB (10.2.2 and later) than on MySQL (8.0.17 and later): each server reads the comment that is
-- meant for it.

-- name: jids
-- fun, user and tgt are what the load says, for queries, and NULL in rows of other writers until the engine fills them in.
CREATE TABLE IF NOT EXISTS `jids` (
    `jid` VARCHAR(255) CHARACTER SET utf8mb4 /*M!100202 COLLATE utf8mb4_nopad_bin */ /*!80017 COLLATE utf8mb4_0900_bin */ NOT NULL,
    `load` LONGTEXT NOT NULL,
    `fun` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NULL DEFAULT NULL,
    `user` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NULL DEFAULT NULL,
    `tgt` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NULL DEFAULT NULL,
    PRIMARY KEY (`jid`),
    KEY `fun` (`fun`),
    KEY `user` (`user`),
    KEY `tgt` (`tgt`)
) ENGINE = InnoDB ROW_FORMAT = DYNAMIC DEFAULT CHARACTER SET = utf8mb4;

-- name: salt_returns
-- failed is 1 where success is 0 or retcode is not, and NULL in rows of other writers until the engine fills it in.
CREATE TABLE IF NOT EXISTS `salt_returns` (
    `fun` VARCHAR(255) NOT NULL,
    `jid` VARCHAR(255) CHARACTER SET utf8mb4 /*M!100202 COLLATE utf8mb4_nopad_bin */ /*!80017 COLLATE utf8mb4_0900_bin */ NOT NULL,
    `return` LONGTEXT NOT NULL,
    `id` VARCHAR(255) CHARACTER SET utf8mb4 /*M!100202 COLLATE utf8mb4_nopad_bin */ /*!80017 COLLATE utf8mb4_0900_bin */ NOT NULL,
    `success` VARCHAR(10) NOT NULL,
    `full_ret` LONGTEXT NOT NULL,
    `alter_time` TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6),
    `failed` TINYINT NULL DEFAULT NULL,
    PRIMARY KEY (`jid`, `id`),
    KEY `id` (`id`),
    KEY `fun` (`fun`, `id`, `jid`),
    KEY `failed` (`failed`, `jid`),
    KEY `alter_time` (`alter_time`)
) ENGINE = InnoDB ROW_FORMAT = DYNAMIC DEFAULT CHARACTER SET = utf8mb4;

-- name: salt_events
CREATE TABLE IF NOT EXISTS `salt_events` (
    `id` BIGINT NOT NULL AUTO_INCREMENT,
    `tag` VARCHAR(255) NOT NULL,
    `data` LONGTEXT NOT NULL,
    `alter_time` TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6),
    `master_id` VARCHAR(255) NOT NULL,
    `event_key` BINARY(16) NULL DEFAULT NULL,
    PRIMARY KEY (`id`),
    UNIQUE KEY `event_key` (`event_key`),
    KEY `tag` (`tag`),
    KEY `alter_time` (`alter_time`)
) ENGINE = InnoDB ROW_FORMAT = DYNAMIC DEFAULT CHARACTER SET = utf8mb4;

-- name: mysql_jobcache_schema
-- Which of the numbered files of this folder were applied, and when.
CREATE TABLE IF NOT EXISTS `mysql_jobcache_schema` (
    `version` INT NOT NULL,
    `applied_at` TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (`version`)
) ENGINE = InnoDB ROW_FORMAT = DYNAMIC DEFAULT CHARACTER SET = utf8mb4;
